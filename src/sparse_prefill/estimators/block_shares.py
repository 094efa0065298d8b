"""Softmax of rows of logits, summed over blocks of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.fused import block_sums, compile_on_gpu, exp2_shifted

# Softmax of logits is that of powers of 2 of logits times this. On CPUs, torch 2.13 takes 50 times as long for exp of a
# number under -88, as logits far below the highest are, than of others; not so for exp2.
LOG2_E = 1 / math.log(2)
LEAST, TINY = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny  # for a query that sees nothing


def block_shares(logits: Tensor, size: int, scale: float) -> Tensor:
    """Softmax of ``scale`` times logits, to base 2, summed over ``size`` columns.

    Args:
        logits (Tensor): fp32 [B, H, m, n]; may be overwritten.
        size (int): columns in a block.
        scale (float): over 0.

    Returns:
        Tensor: fp32 [B, H, m, ceil(n / size)].
    """
    if not logits.is_cuda:
        peak = logits.amax(-1, keepdim=True).clamp(min=LEAST)
        sums = block_sums(exp2_shifted(logits, peak, scale), size)
        return sums / sums.sum(-1, keepdim=True).clamp(min=TINY)
    ragged = -logits.shape[-1] % size
    logits = F.pad(logits, (0, ragged), value=-torch.inf) if ragged else logits
    peaks, sums = _peaks_and_sums(logits.flatten(), size, scale)
    blocks = (*logits.shape[:-1], -1)
    return _shares(peaks.view(blocks), sums.view(blocks), scale)


@compile_on_gpu
def _peaks_and_sums(logits: Tensor, size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Of each ``size`` of the logits in a row, read once: the highest, and the sum of powers of 2 beside it.

    A vector, whose blocks are where whole numbers say: with more dimensions, each block's place would be divided out.
    """
    logits = logits.unflatten(0, (-1, size))
    peaks = logits.amax(-1).clamp(min=LEAST)
    return peaks, exp2_shifted(logits, peaks[:, None], scale).sum(-1)


@compile_on_gpu
def _shares(peaks: Tensor, sums: Tensor, scale: float) -> Tensor:
    """Shares of blocks in the last dimension, [..., blocks], whose powers were summed beside their own peaks."""
    sums = sums * exp2_shifted(peaks, peaks.amax(-1, keepdim=True), scale)
    return sums / sums.sum(-1, keepdim=True).clamp(min=TINY)

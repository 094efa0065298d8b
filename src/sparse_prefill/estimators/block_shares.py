"""Softmax over rows of logits, summed over blocks of columns."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.fused import block_sums, compile_on_gpu, exp2_shifted

# exp(x) is 2^(x log2(e)). On CPUs, exp of torch 2.13 takes 50 times as long for numbers below -88, and exp2 doesn't.
# Differences between a logit and the highest one are often that low.
LOG2_E = 1 / math.log(2)
LOWEST, TINY = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny  # keep rows without visible keys finite


def block_shares(logits: Tensor, size: int, scale: float) -> Tensor:
    """Softmax to base 2 of ``scale`` times logits, summed over blocks of ``size`` columns.

        share[r, j] = sum over c in block j of 2^(scale * logits[r, c]) / sum over all c of 2^(scale * logits[r, c])

    Args:
        logits (Tensor): fp32 [B, H, m, n]; may be overwritten.
        size (int): columns in a block.
        scale (float): factor of the logits, above 0.

    Returns:
        Tensor: fp32 [B, H, m, ceil(n / size)].
    """
    if not logits.is_cuda:
        peak = logits.amax(-1, keepdim=True).clamp(min=LOWEST)
        sums = block_sums(exp2_shifted(logits, peak, scale), size)
        return sums / sums.sum(-1, keepdim=True).clamp(min=TINY)
    ragged = -logits.shape[-1] % size
    logits = F.pad(logits, (0, ragged), value=-torch.inf) if ragged else logits
    peaks, sums = _peaks_and_sums(logits.flatten(), size, scale)
    blocks = (*logits.shape[:-1], -1)
    return _shares(peaks.view(blocks), sums.view(blocks), scale)


@compile_on_gpu
def _peaks_and_sums(logits: Tensor, size: int, scale: float) -> tuple[Tensor, Tensor]:
    """The highest logit of each block of ``size`` logits, and the sum of 2^(scale * (logit - highest)), in one read.

    The logits are a vector: with more dimensions, the kernel would compute each block's address by divisions.
    """
    logits = logits.unflatten(0, (-1, size))
    peaks = logits.amax(-1).clamp(min=LOWEST)
    return peaks, exp2_shifted(logits, peaks[:, None], scale).sum(-1)


@compile_on_gpu
def _shares(peaks: Tensor, sums: Tensor, scale: float) -> Tensor:
    """Shares of blocks [..., blocks], from the highest logit of each block and the sum of powers relative to it."""
    sums = sums * exp2_shifted(peaks, peaks.amax(-1, keepdim=True), scale)
    return sums / sums.sum(-1, keepdim=True).clamp(min=TINY)

"""Means of the queries or keys of each block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from sparse_prefill.core.key_blocks import of_key_blocks
from sparse_prefill.core.prompt import Prompt

MAX_CAST_ELEMENTS = 2**20  # of half precision that a CPU casts at once: these stay in its cache


def query_means(q: Tensor, prompt: Prompt) -> Tensor:
    """Mean over the real tokens of each query block, or 0 without any: [B, Hq, M, D] to fp32 [B, Hq, n_q, D]."""
    real = None if prompt.left_padding is None else prompt.real_queries(q.device)
    return _means(q, real, prompt.block_size)


def key_means(k: Tensor, prompt: Prompt, name: str = "key means") -> Tensor:
    """Mean over the real tokens of each key block, or 0 without any: [B, Hkv, N, D] to fp32 [B, Hkv, n_k, D].

    If the prompt has a state, means of earlier chunks are read from it. ``name`` is their name there.
    """
    if prompt.left_padding is not None:
        return _means(k, prompt.real_keys(k.device), prompt.block_size)
    return of_key_blocks(name, k, prompt, lambda part: _means(part, None, prompt.block_size))


def _means(x: Tensor, real: Tensor | None, size: int) -> Tensor:
    if real is not None:
        slots = real[:, None, :, None]  # [B, 1, slots, 1]
        x = torch.where(slots, F.pad(x, (0, 0, 0, slots.shape[2] - x.shape[2])), 0)
        count = reduce(slots, "b h (n size) d -> b h n d", "sum", size=size).clamp(min=1)
        return _sums(x, size) / count
    whole = x.shape[2] // size * size
    means = _sums(x[:, :, :whole], size) / size
    if whole == x.shape[2]:
        return means
    return torch.cat([means, x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], dim=2)


def _sums(x: Tensor, size: int) -> Tensor:
    """Sums over blocks of ``size`` tokens: [B, H, n * size, D] to fp32 [B, H, n, D]."""
    batch, heads, tokens, dim = x.shape
    blocks = x.unflatten(2, (-1, size))
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return blocks.sum(3, dtype=torch.float32)
    sums = torch.empty(batch, heads, tokens // size, dim)
    at_once = max(1, MAX_CAST_ELEMENTS // (batch * heads * size * dim))
    for i in range(0, tokens // size, at_once):
        sums[:, :, i : i + at_once] = blocks[:, :, i : i + at_once].sum(3, dtype=torch.float32)
    return sums

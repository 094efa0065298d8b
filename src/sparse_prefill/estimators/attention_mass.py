"""True attention probabilities of some queries, summed over blocks of keys, without ever storing them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_mass(q: Tensor, k: Tensor, allowed: Tensor, block_size: int) -> Tensor:
    """Share of each query's attention that falls on each block of keys.

    It is attention whose value of a key is the one-hot of its block, so the fused attention kernel computes it
    with no table of tokens by tokens. One such call sees at most D blocks (a kernel is fast where values are as wide
    as queries); longer prompts weigh the calls over D blocks each by one more call, whose value is the one-hot of
    the D blocks.

    Args:
        q (Tensor): queries [B, Hq, m, D].
        k (Tensor): keys [B, Hkv, N, D].
        allowed (Tensor): which pairs may attend, bool [B or 1, 1, m, N].
        block_size (int): tokens in a block.

    Returns:
        Tensor: fp32 [B, Hq, m, ceil(N / block_size)]. Each query's row sums to 1, or to 0 if it may attend to
        nothing.
    """
    n_tokens, width = k.shape[2], q.shape[3]
    span = width * block_size  # tokens that one call tells apart
    # The heads that share keys are rows of one head: no key is repeated, and no kernel has to know of groups.
    group = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (k.shape[1], group)).flatten(2, 3)  # [B, Hkv, group * m, D]
    allowed = allowed.repeat(1, 1, group, 1)
    if n_tokens <= span:
        mass = _grouped_mass(rows, k, allowed, block_size)[..., : -(-n_tokens // block_size)]
    else:
        weight = _grouped_mass(rows, k, allowed, span)  # columns past the last span are 0
        parts = []
        for i, begin in enumerate(range(0, n_tokens, span)):
            keys, seen = k[:, :, begin : begin + span], allowed[..., begin : begin + span]
            part = _grouped_mass(rows, keys, seen, block_size)[..., : -(-keys.shape[2] // block_size)]
            parts.append(part * weight[..., i, None])
        mass = torch.cat(parts, dim=-1)
    return mass.unflatten(2, (group, -1)).flatten(1, 2)


def _grouped_mass(rows: Tensor, k: Tensor, allowed: Tensor, size: int) -> Tensor:
    """Mass on each of the first D groups of ``size`` consecutive keys: fp32 [B, Hkv, rows, D]."""
    group = torch.arange(k.shape[2], device=k.device) // size
    values = F.one_hot(group, k.shape[3]).to(k.dtype).expand(*k.shape[:2], -1, -1)
    mass = F.scaled_dot_product_attention(rows, k, values, attn_mask=allowed).float()
    return mass.masked_fill(~allowed.any(-1, keepdim=True), 0)  # a query that sees nothing has no mass

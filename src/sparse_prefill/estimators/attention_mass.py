"""True attention probabilities of some queries, summed over blocks of keys, without ever storing them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_mass(q: Tensor, k: Tensor, allowed: Tensor, block_size: int) -> Tensor:
    """Share of each query's attention that falls on each block of keys.

    It is attention whose value of a key is the one-hot of its block, so the fused attention kernel computes it
    with no table of tokens by tokens. One such call tells at most D blocks apart (a kernel is fast where values are
    as wide as queries); longer prompts weigh the calls over D blocks each by one more call, whose value is the
    one-hot of those calls.

    Args:
        q (Tensor): queries [B, Hq, m, D].
        k (Tensor): keys [B, Hkv, N, D], N at most D * D blocks.
        allowed (Tensor): which pairs may attend, bool [B or 1, 1, m, N].
        block_size (int): tokens in a block.

    Returns:
        Tensor: fp32 [B, Hq, m, ceil(N / block_size)]. Each query's row sums to 1, or to 0 if it may attend to
        nothing. With bf16 inputs each entry is rounded to bf16.

    Raises:
        ValueError: if N is more than D * D blocks.
    """
    n_tokens, width = k.shape[2], q.shape[3]
    span = width * block_size  # tokens that one call tells apart
    if n_tokens > width * span:
        raise ValueError(
            f"With head_dim {width}, attention mass is known over at most {width * span:,} tokens, got {n_tokens:,}: "
            "take larger blocks."
        )
    if n_tokens <= span:
        return _grouped_mass(q, k, allowed, block_size)
    weight = _grouped_mass(q, k, allowed, span)
    parts = []
    for i, begin in enumerate(range(0, n_tokens, span)):
        part = slice(begin, begin + span)
        parts.append(_grouped_mass(q, k[:, :, part], allowed[..., part], block_size) * weight[..., i, None])
    return torch.cat(parts, dim=-1)


def _grouped_mass(q: Tensor, k: Tensor, allowed: Tensor, size: int) -> Tensor:
    """Mass on each group of ``size`` consecutive keys, of which there are at most D: fp32 [B, Hq, m, groups]."""
    groups = -(-k.shape[2] // size)
    one_hot = torch.eye(groups, k.shape[3], dtype=k.dtype, device=k.device)
    values = one_hot.repeat_interleave(size, dim=0)[: k.shape[2]].expand(*k.shape[:2], -1, -1)  # [B, Hkv, N, D]
    mass = F.scaled_dot_product_attention(q, k, values, attn_mask=allowed, enable_gqa=True)
    return mass[..., :groups].float().nan_to_num(0)  # a query that sees nothing has no mass

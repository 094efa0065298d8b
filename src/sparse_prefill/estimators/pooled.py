"""Attention between the means of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.prompt import Prompt
from sparse_prefill.registry import register_estimator


def block_means(x: Tensor, real: Tensor, block_size: int) -> Tensor:
    """Mean over the real tokens of each block.

    Args:
        x (Tensor): queries or keys [B, H, tokens, D].
        real (Tensor): which slots hold a real token, bool [B or 1, blocks * block_size].
        block_size (int): tokens in a block.

    Returns:
        Tensor: fp32 [B, H, blocks, D]; 0 for a block without a real token.
    """
    slots = real.shape[1]
    everything_real = x.shape[2] == slots and real.shape[0] == 1
    if not everything_real:
        x = F.pad(x, (0, 0, 0, slots - x.shape[2]))
        x = torch.where(real[:, None, :, None], x, 0)
    count = real.unflatten(1, (-1, block_size)).sum(-1).clamp(min=1)  # [B, blocks]
    return x.unflatten(2, (-1, block_size)).sum(3, dtype=torch.float32) / count[:, None, :, None]


@register_estimator("pooled_attention")
@dataclass(frozen=True, kw_only=True)
class PooledAttention:
    """Softmax over the visible key blocks of the product of query-block means and key-block means.

    Means are taken over real tokens only. Each query block's row sums to 1. Scratch memory is
    B x Hq x n_q x n_k in fp32.
    """

    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): what the tokens are.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k].
        """
        q_means = block_means(q, prompt.real_queries(q.device), prompt.block_size)
        k_means = block_means(k, prompt.real_keys(k.device), prompt.block_size)
        return pooled_attention(q_means, k_means, prompt)


def pooled_attention(q_means: Tensor, k_means: Tensor, prompt: Prompt) -> Tensor:
    """Softmax over the visible blocks of q_means [B, Hq, n_q, D] times k_means [B, Hkv, n_k, D]: [B, Hq, n_q, n_k]."""
    visible = prompt.visible(q_means.device)
    logits = group_product(q_means, k_means) * q_means.shape[-1] ** -0.5
    # Query blocks of padding see nothing: 0, not NaN.
    return logits.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0)


def group_product(q: Tensor, k: Tensor) -> Tensor:
    """q [B, Hq, m, D] times k [B, Hkv, n, D] transposed, each query head with its own key head: [B, Hq, m, n]."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, group, m, D]
    return (grouped @ k[:, :, None].transpose(-1, -2)).flatten(1, 2)

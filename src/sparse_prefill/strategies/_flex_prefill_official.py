"""The selection rule of FlexPrefill's released code, with its faults, for comparison with published results."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators import group_product, key_means, pooled_attention, query_means
from sparse_prefill.selectors import top_k
from sparse_prefill.selectors.cumulative import cumulative


def official_keep(q: Tensor, k: Tensor, prompt: Prompt, gamma: float, tau: float, least: int, most: int) -> Tensor:
    """Keep table as released, for whole unpadded prompts: bool [B, Hq, n, n].

    Args:
        q (Tensor): queries [B, Hq, N, D].
        k (Tensor): keys [B, Hkv, N, D].
        prompt (Prompt): lengths and block size.
        gamma (float): share of the attention.
        tau (float): largest distance of a query-aware head.
        least (int): least number of columns, and of diagonals.
        most (int): largest number of either.
    """
    n_tokens, size, n = prompt.kv_len, prompt.block_size, prompt.n_k
    if n_tokens <= max(2, least) * size:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    pad = n * size - n_tokens
    scaled = q / q.shape[-1] ** 0.5

    # The last tokens' attention, by key and by distance.
    last = scaled[:, :, -size:]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    logits = group_product(last, k).float()
    logits[..., -size:].masked_fill_(future, -torch.inf)
    probability = logits.softmax(-1)  # [B, Hq, size, N]
    by_key = probability.mean(2)
    by_distance = _sum_diagonals(probability) / size

    # Counted in tokens and divided by 128, whatever the block size.
    def budget(mass: Tensor) -> Tensor:
        ranked = mass.sort(dim=-1, descending=True).values
        tokens = (ranked.cumsum(-1) <= gamma).sum(-1, keepdim=True) + 1
        return (tokens // 128 + 1).clamp(min=least).clamp(max=most)

    vertical = F.pad(by_key, (0, pad)).unflatten(-1, (n, size)).sum(-1)
    slash = F.pad(by_distance, (pad, 0)).unflatten(-1, (n, size)).sum(-1)

    k_means = key_means(k, prompt).to(k.dtype)
    pooled = group_product(last.mean(2, keepdim=True), k_means)[:, :, 0].float().softmax(-1)
    middle = (pooled + vertical) / 2
    divergence = pooled * (pooled / middle).log() + vertical * (vertical / middle).log()
    # An empty bin makes this NaN, and NaN is not under tau.
    query_aware = (divergence.sum(-1, keepdim=True) / 2).sqrt() < tau  # [B, Hq, 1]

    n_columns = torch.where(query_aware, least, budget(by_key))
    n_diagonals = torch.where(query_aware, least, budget(by_distance))
    vertical[..., 0] = slash[..., 0] = torch.inf  # the sink and the main diagonal, inside the budget
    columns, diagonals = top_k(vertical, n_columns), top_k(slash, n_diagonals)
    block = torch.arange(n, device=q.device)
    distance = block[:, None] - block
    keep = columns[:, :, None] | (diagonals[..., distance.clamp(min=0)] & (distance >= 0))

    # Query-aware heads: one budget over the whole pooled map; the block that crosses it is dropped.
    q_means = query_means(q, prompt).to(q.dtype)
    everywhere = pooled_attention(q_means.float(), k_means.float(), prompt)
    return keep | (cumulative(everywhere.flatten(2), gamma, "within").view_as(keep) & query_aware[..., None])


def _sum_diagonals(probability: Tensor) -> Tensor:
    """Sum over the rows of what lies at each distance before the row's own token: [B, H, rows, N] to [B, H, N]."""
    rows, n_tokens = probability.shape[-2:]
    # Reversed, each row is shifted against the one above by one step: a view with a stride one shorter lines them up.
    reverse = F.pad(probability.flip(-1), (0, rows)).contiguous()
    strides = (*reverse.stride()[:-2], n_tokens + rows - 1, 1)
    return reverse.as_strided(probability.shape, strides, rows - 1).sum(-2)

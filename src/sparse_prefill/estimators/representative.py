"""Exact attention of the last queries, as a sample of the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.fused import compile_on_gpu
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_mass import attention_mass, center_keys
from sparse_prefill.registry import register_estimator


class Representative(NamedTuple):
    """Attention of the representative queries.

    Attributes:
        vertical (Tensor): mean attention by key block, fp32 [B, Hq, n_k]; sums to 1.
        slash (Tensor): mean attention by block diagonal, fp32 [B, Hq, n_k]; sums to 1. Diagonal o holds the keys whose
            block lies o blocks before the query's.
        mean_query (Tensor): mean of the queries, fp32 [B, Hq, 1, D].
        peak (Tensor): the highest attention of any one query to each key block, fp32 [B, Hq, n_k].
    """

    vertical: Tensor
    slash: Tensor
    mean_query: Tensor
    peak: Tensor


@register_estimator("representative")
@dataclass(frozen=True, kw_only=True)
class RepresentativeMass:
    """Exact attention of the last queries, by key block and by block diagonal.

    With R the representative queries at positions p_r, b the block size and mass[r, j] the attention of query r to key
    block j:

        vertical[j] = mean over r in R of mass[r, j]
        slash[o]    = mean over r in R of mass[r, floor(p_r / b) - o]
        peak[j]     = max over r in R of mass[r, j]

    These are the vertical and slash sums of MInference (arXiv 2407.02490, Algorithm 2), which FlexPrefill (arXiv
    2502.20766) uses as well, by block instead of by token. The diagonal of a key block is counted from the block of the
    query's own position, so the sums follow the block grid even if the last queries lie in two blocks.

    On CPUs that multiply bf16, the logits of bf16 inputs are rounded to bf16: see :func:`center_keys`. Scratch memory
    is B x Hq x queries x n_k in fp32, the memory of :func:`attention_mass` and, with rounding, a copy of the keys.

    Args:
        queries (int | None): number of last queries to take R from, at least 1. Default: ``block_size``.
        stride (int): R is the last query and every ``stride``-th before it, at least 1. Default: 1, i.e. all of them.

    Raises:
        ValueError: if an option isn't a whole number or is below 1.
    """

    queries: int | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        if self.queries is not None:
            check_tokens("queries", self.queries, least=1)
        check_tokens("stride", self.stride, least=1)

    @own_precision
    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Representative:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): lengths and padding of the tokens.

        Returns:
            Representative: the sums.
        """
        size = prompt.block_size
        count = min(self.queries or size, prompt.q_len)
        rows, allowed = prompt.last_rows(count, q.device)
        taken = slice((count - 1) % self.stride, None, self.stride)
        q, rows, allowed = q[:, :, -count:][:, :, taken], rows[taken], allowed[:, :, taken]
        real = (rows >= prompt.start(q.device)[:, None])[:, None, :, None]  # [B, 1, rows, 1]
        n_real = real.sum(2).clamp(min=1)  # [B, 1, 1]
        keys, rounded = center_keys(q, k, prompt, size)
        mass = attention_mass(q, keys, allowed, size, rounded=rounded)  # [B, Hq, rows, n_k]

        # A prefix that isn't a whole number of blocks shifts query blocks against key blocks, so a row's diagonals are
        # counted from the key block at the row's position.
        distance = (rows // size)[:, None] - torch.arange(prompt.n_k, device=q.device)  # [rows, n_k]
        diagonal = distance.clamp(min=0).expand_as(mass).flatten(2)  # future blocks have no mass
        slash = torch.zeros_like(mass[:, :, 0]).scatter_add(-1, diagonal, mass.flatten(2))
        mean_query = torch.where(real, q, 0).sum(2, keepdim=True, dtype=torch.float32) / n_real[..., None]
        return Representative(mass.sum(2) / n_real, slash / n_real, mean_query, mass.amax(2))


def by_diagonal(values: Tensor, prompt: Prompt) -> Tensor:
    """Give each block the value of its block diagonal: [B, H, n_k] to [B, H, n_q, n_k].

        table[i, j] = values[i' - j], with i' the key block of query block i; 0 for j > i'

    After a prefix that isn't a whole number of blocks, a query block lies in two key blocks. It takes the larger of the
    two values.
    """
    device, size = values.device, prompt.block_size
    first = torch.arange(prompt.offset, prompt.kv_len, size, device=device)  # [n_q]
    spread = _spread(values, first // size)
    if prompt.offset % size == 0:
        return spread
    last = (first + size - 1).clamp(max=prompt.kv_len - 1)
    return torch.maximum(spread, _spread(values, last // size))


@compile_on_gpu
def _spread(values: Tensor, rows: Tensor) -> Tensor:
    """values [..., n_k] by diagonal as a table [..., n_q, n_k] for row blocks [n_q]; 0 for later keys."""
    distance = rows[:, None] - torch.arange(values.shape[-1], device=values.device)  # [n_q, n_k]
    return values[..., distance.clamp(min=0)] * (distance >= 0)

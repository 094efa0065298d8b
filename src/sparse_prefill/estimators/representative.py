"""True attention of the last queries, which stand for the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.fused import compile_on_gpu
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_mass import attention_mass, keys_to_multiply
from sparse_prefill.registry import register_estimator


class Representative(NamedTuple):
    """Attention mass of the representative queries, mean over them but for the peak.

    Shapes: vertical fp32 [B, Hq, n_k], by key block; slash fp32 [B, Hq, n_k], by block diagonal, i.e. how many
    blocks the key's block lies before the query's; each of both sums to 1. mean_query fp32 [B, Hq, 1, D], mean of the
    queries; peak fp32 [B, Hq, n_k], the most that one query gives to a key block.
    """

    vertical: Tensor
    slash: Tensor
    mean_query: Tensor
    peak: Tensor


@register_estimator("representative")
@dataclass(frozen=True, kw_only=True)
class RepresentativeMass:
    """Exact attention of the last queries, by key block and by block diagonal of the grid.

    The sums are those of the block grid also where the last queries span two blocks of it. On CPUs that multiply bf16,
    logits of bf16 inputs are rounded to it: see :func:`keys_to_multiply`. Scratch memory is B x Hq x queries x n_k in
    fp32, besides what :func:`attention_mass` needs and, with rounding, a copy of the keys.

    Args:
        queries (int | None): how many of the last queries stand for the prompt, at least 1. Default: ``block_size``.
        stride (int): queries from one that is looked at to the next, at least 1, counted from the last one. Default: 1,
            i.e. all of them are.

    Raises:
        ValueError: if an option is no whole number or under 1.
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
            prompt (Prompt): what the tokens are.

        Returns:
            Representative: the masses.
        """
        size = prompt.block_size
        count = min(self.queries or size, prompt.q_len)
        rows, allowed = prompt.last_rows(count, q.device)
        taken = slice((count - 1) % self.stride, None, self.stride)
        q, rows, allowed = q[:, :, -count:][:, :, taken], rows[taken], allowed[:, :, taken]
        real = (rows >= prompt.start(q.device)[:, None])[:, None, :, None]  # [B, 1, rows, 1]
        n_real = real.sum(2).clamp(min=1)  # [B, 1, 1]
        keys, rounded = keys_to_multiply(q, k, prompt, size)
        mass = attention_mass(q, keys, allowed, size, rounded=rounded)  # [B, Hq, rows, n_k]

        # Query blocks stand off the key grid behind a prefix of no whole number of blocks: a row's diagonal is
        # counted from the block that its own key lies in.
        distance = (rows // size)[:, None] - torch.arange(prompt.n_k, device=q.device)  # [rows, n_k]
        diagonal = distance.clamp(min=0).expand_as(mass).flatten(2)  # future blocks have no mass
        slash = torch.zeros_like(mass[:, :, 0]).scatter_add(-1, diagonal, mass.flatten(2))
        mean_query = torch.where(real, q, 0).sum(2, keepdim=True, dtype=torch.float32) / n_real[..., None]
        return Representative(mass.sum(2) / n_real, slash / n_real, mean_query, mass.amax(2))


def by_diagonal(values: Tensor, prompt: Prompt) -> Tensor:
    """Spread what is known of each block diagonal over the blocks on it: [B, H, n_k] to [B, H, n_q, n_k].

    The diagonal is how many blocks a key lies before a query. A query block behind a prefix of no whole number of
    blocks lies across two of the key grid, and takes the larger value of both. Later keys have 0.
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
    """values [..., n_k] of the diagonals on which row blocks [n_q] meet each key block, 0 for later keys."""
    distance = rows[:, None] - torch.arange(values.shape[-1], device=values.device)  # [n_q, n_k]
    return values[..., distance.clamp(min=0)] * (distance >= 0)

"""True attention of the last queries, which stand for the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.estimators.attention_mass import attention_mass
from sparse_prefill.prompt import Prompt
from sparse_prefill.registry import register_estimator


class Representative(NamedTuple):
    """Attention mass of the representative queries, mean over them; each vector sums to 1.

    Shapes: vertical fp32 [B, Hq, n_k], by key block; slash fp32 [B, Hq, n_k], by block diagonal, i.e. how many
    blocks the key's block lies before the query's; mean_query fp32 [B, Hq, 1, D], mean of the queries.
    """

    vertical: Tensor
    slash: Tensor
    mean_query: Tensor


@register_estimator("representative")
@dataclass(frozen=True, kw_only=True)
class RepresentativeMass:
    """Exact attention of the last ``block_size`` queries, by key block and by block diagonal of the grid.

    The sums are exact on the block grid also where the last queries span two blocks of it. Scratch memory is
    B x Hq x block_size x n_k in fp32 and block_size x N in bool: no table of tokens by tokens.
    """

    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Representative:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): what the tokens are.

        Returns:
            Representative: the masses.
        """
        size, count = prompt.block_size, min(prompt.block_size, prompt.q_len)
        q = q[:, :, -count:]
        rows, allowed = prompt.last_rows(count, q.device)
        real = (rows >= prompt.start(q.device)[:, None])[:, None, :, None]  # [B, 1, rows, 1]
        n_real = real.sum(2).clamp(min=1)  # [B, 1, 1]
        mass = attention_mass(q, k, allowed, size)  # [B, Hq, rows, n_k]

        # Query blocks stand off the key grid behind a prefix of no whole number of blocks: a row's diagonal is
        # counted from the block that its own key lies in.
        distance = (rows // size)[:, None] - torch.arange(prompt.n_k, device=q.device)  # [rows, n_k]
        diagonal = distance.clamp(min=0).expand_as(mass).flatten(2)  # future blocks have no mass
        slash = torch.zeros_like(mass[:, :, 0]).scatter_add(-1, diagonal, mass.flatten(2))
        mean_query = torch.where(real, q, 0).sum(2, keepdim=True, dtype=torch.float32) / n_real[..., None]
        return Representative(mass.sum(2) / n_real, slash / n_real, mean_query)

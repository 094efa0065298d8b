"""The true attention mass of every block: exact, and as slow as dense attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_mass import attention_mass
from sparse_prefill.registry import register_estimator


@register_estimator("true_mass")
@dataclass(frozen=True, kw_only=True)
class TrueMass:
    """Mean attention probability mass that the queries of a block put on each block of keys, in fp32.

    Each query block's row sums to 1. Queries are taken in chunks; besides what :func:`attention_mass` needs, scratch
    memory is B x Hq x (chunk * block_size) x n_k in fp32.

    Args:
        chunk (int): query blocks to compute at once, at least 1. Default: 8.

    Raises:
        ValueError: if ``chunk`` is no whole number or under 1.
    """

    chunk: int = 8

    def __post_init__(self) -> None:
        check_tokens("chunk", self.chunk, least=1)

    @own_precision
    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): what the tokens are.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k].
        """
        blocks = range(0, prompt.n_q, self.chunk)
        return torch.cat([self.rows(q, k, prompt, range(i, min(i + self.chunk, prompt.n_q))) for i in blocks], dim=2)

    def rows(self, q: Tensor, k: Tensor, prompt: Prompt, blocks: range) -> Tensor:
        """The scores of some consecutive query blocks: fp32 [B, Hq, len(blocks), n_k]."""
        size = prompt.block_size
        begin, end = blocks.start * size, min(blocks.stop * size, prompt.q_len)
        positions = prompt.query_positions(q.device)[begin:end]
        seen = min(-(-(prompt.offset + end) // size) * size, prompt.kv_len)  # later keys are in no row's sight
        keys = torch.arange(prompt.all_see(prompt.offset + begin), seen, device=q.device)
        mass = attention_mass(q[:, :, begin:end], k[:, :, :seen], prompt.may_attend(positions, keys), size)
        slots = len(blocks) * size
        mass = F.pad(mass, (0, prompt.n_k - mass.shape[-1], 0, slots - mass.shape[2])).unflatten(2, (-1, size))
        real = prompt.real_queries(q.device)[:, blocks.start * size : blocks.stop * size]
        real = real.unflatten(1, (-1, size)).sum(-1).clamp(min=1)  # [B, blocks]
        return mass.sum(3) / real[:, None, :, None]

"""The exact attention of each block, as slow as dense attention."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Mean attention that the queries of a block give to each block of keys.

    With R_i the real queries of block i, C_j the keys of block j and P the attention probabilities of the prompt:

        score[i, j] = mean over r in R_i of the sum over c in C_j of P[r, c]

    Each query block's row sums to 1. Queries are taken in chunks. Scratch memory is B x Hq x (chunk * block_size) x n_k
    in fp32 and the memory of :func:`attention_mass`.

    Args:
        chunk (int): query blocks to compute at once, at least 1. Default: 8.

    Raises:
        ValueError: if ``chunk`` isn't a whole number or is below 1.
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
            prompt (Prompt): lengths, padding, documents and window of the tokens.

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
        seen = min(-(-(prompt.offset + end) // size) * size, prompt.kv_len)  # no row sees later keys
        keys = torch.arange(prompt.num_common_keys(prompt.offset + begin), seen, device=q.device)
        mass = attention_mass(q[:, :, begin:end], k[:, :, :seen], prompt.may_attend(positions, keys), size)
        slots = len(blocks) * size
        mass = F.pad(mass, (0, prompt.n_k - mass.shape[-1], 0, slots - mass.shape[2])).unflatten(2, (-1, size))
        real = prompt.real_queries(q.device)[:, blocks.start * size : blocks.stop * size]
        real = real.unflatten(1, (-1, size)).sum(-1).clamp(min=1)  # [B, blocks]
        return mass.sum(3) / real[:, None, :, None]


def true_mass(q: Tensor, k: Tensor, prompt: Prompt, query_blocks: Sequence[int]) -> Tensor:
    """:class:`TrueMass` of some query blocks.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        prompt (Prompt): lengths, padding, documents and window of the tokens.
        query_blocks (Sequence[int]): the query blocks, each in [0, n_q).

    Returns:
        Tensor: fp32 [B, Hq, len(query_blocks), n_k]; each row sums to 1, those of padding to 0.

    Raises:
        ValueError: if a block is out of range, or if queries or keys aren't finite.
    """
    check_blocks(query_blocks, prompt)
    estimator = TrueMass()
    mass = torch.cat([estimator.rows(q, k, prompt, range(i, i + 1)) for i in query_blocks], dim=2)
    if not bool(mass.isfinite().all()):
        raise ValueError("Queries or keys hold NaN or infinity, so that nothing can be measured: try another dtype.")
    return mass


def check_blocks(query_blocks: Sequence[int], prompt: Prompt) -> None:
    """Raise ValueError unless there is at least one query block and all are blocks of the prompt."""
    outside = [i for i in query_blocks if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < prompt.n_q]
    if outside or not query_blocks:
        raise ValueError(f"query_blocks must be some of 0 to {prompt.n_q - 1}, got {list(query_blocks)}.")

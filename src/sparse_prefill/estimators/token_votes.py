"""Key blocks that each query chooses, counted by query block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators.block_means import key_means
from sparse_prefill.estimators.token_block import token_logits
from sparse_prefill.registry import register_estimator
from sparse_prefill.selectors.top_k import top_k

MAX_LOGITS = 2**24  # held at once, unless one query block has more


@register_estimator("token_votes")
@dataclass(frozen=True, kw_only=True)
class TokenVotes:
    """Share of the queries of a block that choose a key block.

    With K_j the mean of key block j and own(r) the block of query r:

        chosen(r) = the k blocks j of the highest g[r, j], where g[r, j] = q_r . K_j for blocks that end before own(r),
                    +infinity for own(r), -infinity for later blocks
        score[i, j] = share of the real queries r of block i with j in chosen(r)

    This is the gate of MoBA (arXiv 2502.13189) as in its released code. Of equal products, a query chooses the earlier
    block. Padding chooses nothing.

    Scores are computed in fp32 for some query blocks at a time. Scratch memory is the key means and a few tables of
    2^24 logits, or of the logits of one query block, B x Hq x block_size x n_k, if that is more.

    Args:
        k (int): blocks that a query chooses, its own included, at least 1. Default: 12.

    Raises:
        ValueError: if ``k`` isn't a whole number or is below 1; at a call, if the prompt has several documents.
    """

    k: int = 12

    def __post_init__(self) -> None:
        check_tokens("k", self.k, least=1)

    @own_precision
    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): lengths and padding of the tokens.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k], in [0, 1].
        """
        check_one_document("The token_votes estimator", "the mean of a block may mix two of them", prompt)
        k_means = key_means(k, prompt)
        blocks = max(1, MAX_LOGITS // (q.shape[0] * q.shape[1] * prompt.block_size * prompt.n_k))
        parts = [self._rows(q, k_means, prompt, i, i + blocks) for i in range(0, prompt.n_q, blocks)]
        return torch.cat(parts, dim=2)

    def _rows(self, q: Tensor, k_means: Tensor, prompt: Prompt, first: int, stop: int) -> Tensor:
        """The scores of the query blocks from ``first`` to before ``stop``: fp32 [B, Hq, blocks, n_k]."""
        size, device = prompt.block_size, q.device
        rows = slice(first * size, stop * size)
        logits = token_logits(q[:, :, rows], k_means, rows.start, prompt)  # [B, Hq, m, n]
        m, n = logits.shape[2:]
        positions = prompt.query_positions(device)[rows]
        real = prompt.real_queries(device)[:, rows]  # [B, slots]
        own = positions[:, None] // size == torch.arange(n, device=device)  # [m, n]
        logits.masked_fill_(own & real[:, None, :m, None], torch.inf)
        chosen = top_k(logits, self.k) & (logits > -torch.inf)
        votes = F.pad(chosen, (0, prompt.n_k - n, 0, -m % size)).unflatten(2, (-1, size)).sum(3)
        return votes / real.unflatten(1, (-1, size)).sum(-1).clamp(min=1)[:, None, :, None]

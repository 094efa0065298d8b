"""Attention of each query to the means of key blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.fused import exp2_shifted
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_mass import gpu_query_blocks
from sparse_prefill.estimators.block_means import key_means
from sparse_prefill.estimators.block_shares import LOG2_E, LOWEST, TINY
from sparse_prefill.estimators.pooled import gpu_multiplies, mean_logits
from sparse_prefill.estimators.token_sums import MIN_HEAD_DIM, token_shares
from sparse_prefill.registry import register_estimator

MAX_LOGITS_CPU = 2**24  # held at once, unless one query block has more
MAX_QUERY_BLOCKS_CPU = 8  # taken at once; more of them leave its cache


@register_estimator("token_by_mean")
@dataclass(frozen=True, kw_only=True)
class TokenByMean:
    """Exponentials of the products of queries and key-block means, summed over the queries of a block.

    With K_j the mean of key block j, and the queries r of block i that score block j:

        energy[i, j] = sum over r of exp(q_r . K_j / sqrt(D))
        score[i, j] = energy[i, j] / sum over j of energy[i, j]

    Queries aren't pooled, so one query that attends to a key block is enough for a high score. A query scores the key
    blocks of its document that end at or before its position, so only the last query of a block scores its own block.
    Blocks that no query scores have 0. Each query block's row sums to 1, or to 0 if nothing is scored. This is the
    estimate of FlashPrefill (arXiv 2603.06199) as in its released code.

    Scores are computed in fp32 for some query blocks at a time. Scratch memory is the key means and two tables of 2^24
    logits (2^28 on a GPU), or of the logits of one query block, B x Hq x block_size x n_k, if that is more. On a GPU,
    inputs in half precision are multiplied in fp16, without a table of logits: see :func:`token_shares`.

    Args:
        per_group (bool): whether to sum over the query heads of each key head as well, so that they have the same
            scores. Default: False.

    Raises:
        ValueError: if ``per_group`` isn't a bool.
    """

    per_group: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.per_group, bool):
            raise ValueError(f"per_group must be True or False, got {self.per_group!r}.")

    @own_precision
    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): lengths, padding and documents of the tokens.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k].
        """
        batch, heads, _, dim = q.shape
        group = heads // k.shape[1] if self.per_group else 1
        k_means = key_means(k, prompt)
        if gpu_multiplies(q) and dim >= MIN_HEAD_DIM:
            scores = token_shares(q, k_means, prompt, group)
            return scores.repeat_interleave(group, dim=1) if group > 1 else scores
        k_means = k_means * (LOG2_E * dim**-0.5)
        logits = batch * heads * prompt.block_size * prompt.n_k  # of a query block
        if q.device.type == "cpu":
            blocks = max(1, min(MAX_QUERY_BLOCKS_CPU, MAX_LOGITS_CPU // logits))
        else:
            blocks = gpu_query_blocks(logits, prompt.n_q)
        scores = torch.zeros(batch, heads // group, prompt.n_q, prompt.n_k, device=q.device)
        for begin in range(0, prompt.n_q, blocks):
            rows = slice(begin * prompt.block_size, (begin + blocks) * prompt.block_size)
            share = _share(q[:, :, rows], k_means, rows.start, group, prompt)
            scores[:, :, begin : begin + blocks, : share.shape[-1]] = share
        return scores.repeat_interleave(group, dim=1) if group > 1 else scores


def _share(q: Tensor, k_means: Tensor, begin: int, group: int, prompt: Prompt) -> Tensor:
    """Scores of the query blocks from row ``begin`` on, for the key blocks up to the last of them.

    Returns:
        Tensor: fp32 [B, Hq / group, blocks, n], summed over ``group`` consecutive heads.
    """
    size = prompt.block_size
    logits = token_logits(q, k_means, begin, prompt)
    if logits.shape[2] % size:
        logits = F.pad(logits, (0, 0, 0, -logits.shape[2] % size), value=-torch.inf)
    logits = logits.unflatten(2, (-1, size)).unflatten(1, (-1, group))  # [B, Hq / group, group, blocks, size, n]
    energy = exp2_shifted(logits, logits.amax((2, 4, 5), keepdim=True).clamp(min=LOWEST)).sum((2, 4))
    return energy / energy.sum(-1, keepdim=True).clamp(min=TINY)


def token_logits(q: Tensor, k_means: Tensor, begin: int, prompt: Prompt) -> Tensor:
    """Products of queries with the means of the key blocks that end at or before their own position.

    Args:
        q (Tensor): consecutive queries of the prompt [B, Hq, m, D].
        k_means (Tensor): means of all key blocks, fp32 [B, Hkv, n_k, D].
        begin (int): row of the first of the queries.
        prompt (Prompt): lengths, padding and documents of the tokens.

    Returns:
        Tensor: fp32 [B, Hq, m, n] for the n key blocks up to the one of the last query; -inf for blocks that end after
        the query or lie in another document.
    """
    size = prompt.block_size
    n = -(-(prompt.offset + begin + q.shape[2]) // size)  # no row sees later key blocks
    free = prompt.num_common_keys(prompt.offset + begin) // size  # key blocks that all of these queries score
    columns = torch.arange(free, n, device=q.device)
    first, stop = (x[:, None, begin : begin + q.shape[2], None] for x in prompt.whole_blocks(q.device))  # [B, 1, m, 1]
    logits = mean_logits(q, k_means[:, :, :n])
    logits[..., free:].masked_fill_((columns < first) | (columns >= stop), -torch.inf)
    return logits

"""Attention of every query token to the means of key blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.fused import exp2_shifted
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_mass import blocks_of_gpu
from sparse_prefill.estimators.block_means import key_means
from sparse_prefill.estimators.block_shares import LEAST, LOG2_E, TINY
from sparse_prefill.estimators.pooled import gpu_multiplies, mean_logits
from sparse_prefill.estimators.token_sums import WIDTH, token_shares
from sparse_prefill.registry import register_estimator

LOGITS = 2**24  # most that a CPU holds at once, unless one query block has more
BLOCKS = 8  # most that a CPU takes at once; more of them fall out of its cache


@register_estimator("token_by_mean")
@dataclass(frozen=True, kw_only=True)
class TokenByMean:
    """Sum over the queries of a block of exp(q . mean of a key block / sqrt(D)), as a share of the query block's sum.

    Queries aren't pooled, so a single one that looks at a key block counts. A query scores the key blocks that end at
    or before its own position and lie in its own document; so only the last query of a block scores the block that
    it is in. What no query scores has 0; each query block's row sums to 1, or to 0 where nothing is scored.

    Computed in fp32, some query blocks at a time: besides the scores, scratch memory is the key means and two tables of
    2^24 logits (2^28 on a GPU), or of one query block's B x Hq x block_size x n_k if these are more. On a GPU, inputs
    in half precision are multiplied in fp16 instead, and no table of logits is made: see :func:`token_shares`.

    Args:
        per_group (bool): sum over the query heads of each key head, too, so that these have the same scores.
            Default: False.

    Raises:
        ValueError: if ``per_group`` is no bool.
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
            prompt (Prompt): what the tokens are.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k].
        """
        batch, heads, _, dim = q.shape
        group = heads // k.shape[1] if self.per_group else 1
        k_means = key_means(k, prompt)
        if gpu_multiplies(q) and dim >= WIDTH:
            scores = token_shares(q, k_means, prompt, group)
            return scores.repeat_interleave(group, dim=1) if group > 1 else scores
        k_means = k_means * (LOG2_E * dim**-0.5)
        held = batch * heads * prompt.block_size * prompt.n_k
        at_most = min(BLOCKS, LOGITS // held) if q.device.type == "cpu" else blocks_of_gpu(held, prompt.n_q)
        blocks = max(1, at_most)
        scores = torch.zeros(batch, heads // group, prompt.n_q, prompt.n_k, device=q.device)
        for begin in range(0, prompt.n_q, blocks):
            rows = slice(begin * prompt.block_size, (begin + blocks) * prompt.block_size)
            share = _share(q[:, :, rows], k_means, rows.start, group, prompt)
            scores[:, :, begin : begin + blocks, : share.shape[-1]] = share
        return scores.repeat_interleave(group, dim=1) if group > 1 else scores


def _share(q: Tensor, k_means: Tensor, begin: int, group: int, prompt: Prompt) -> Tensor:
    """Scores of the query blocks from row ``begin`` on, over the key blocks up to the last of them.

    Returns:
        Tensor: fp32 [B, Hq / group, blocks, n], ``group`` heads as one.
    """
    size = prompt.block_size
    logits = token_logits(q, k_means, begin, prompt)
    if logits.shape[2] % size:
        logits = F.pad(logits, (0, 0, 0, -logits.shape[2] % size), value=-torch.inf)
    logits = logits.unflatten(2, (-1, size)).unflatten(1, (-1, group))  # [B, Hq / group, group, blocks, size, n]
    energy = exp2_shifted(logits, logits.amax((2, 4, 5), keepdim=True).clamp(min=LEAST)).sum((2, 4))
    return energy / energy.sum(-1, keepdim=True).clamp(min=TINY)


def token_logits(q: Tensor, k_means: Tensor, begin: int, prompt: Prompt) -> Tensor:
    """Products of queries with the means of those key blocks that end at or before their own position.

    Args:
        q (Tensor): some queries, from row ``begin`` of the prompt on, [B, Hq, m, D].
        k_means (Tensor): means of all key blocks, fp32 [B, Hkv, n_k, D].
        begin (int): which row the first of the queries is.
        prompt (Prompt): what the tokens are.

    Returns:
        Tensor: fp32 [B, Hq, m, n], n counting the key blocks up to that of the last query; -inf of blocks that end
        later and of those in another document.
    """
    size = prompt.block_size
    n = -(-(prompt.offset + begin + q.shape[2]) // size)  # later key blocks are in no row's sight
    free = prompt.num_common_keys(prompt.offset + begin) // size  # key blocks that all of these queries score
    columns = torch.arange(free, n, device=q.device)
    first, stop = (x[:, None, begin : begin + q.shape[2], None] for x in prompt.whole_blocks(q.device))  # [B, 1, m, 1]
    logits = mean_logits(q, k_means[:, :, :n])
    logits[..., free:].masked_fill_((columns < first) | (columns >= stop), -torch.inf)
    return logits

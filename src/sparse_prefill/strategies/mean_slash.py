"""A mixture of what block means, columns and diagonals tell, fitted to each head, by one threshold for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.fused import compile_on_gpu
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.renamed import former_options
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators import PooledAttention, RepresentativeMass
from sparse_prefill.estimators.block_shares import TINY
from sparse_prefill.estimators.representative import by_diagonal
from sparse_prefill.estimators.spread_queries import spread_queries
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import Threshold
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption

EVEN = 0.5  # even shares of attention that a block must be given by default
PEAK = 0.05  # of its attention: what one of the last queries gives so much is kept for them
MEANS = 1024  # of keys, at most, where blocks are no finer
STRIDE = 2  # of the last queries, of which every other one tells next to as much as all do on average
STEPS = 10  # of fitting the weights: more of them change next to nothing
ENTRIES = 2**25  # of the table that are mixed at once: a CPU holds some tables of them
PRIOR = 1e-4  # of a query's attention, given to each part: without queries all parts weigh the same


class _Scores(NamedTuple):
    shares: Tensor  # fp32 [B, Hq, n_q, n_k], what query blocks are thought to give to blocks
    peak: Tensor  # fp32 [B, Hq, n_k], the most that one of the last queries gives


@register_strategy("mean_slash")
@former_options(grain="pool_size")
@dataclass(frozen=True, kw_only=True)
class MeanSlash(Strategy):
    """Keep the blocks that a mixture of cheap estimates gives at least a ``threshold`` of a query block's attention.

    Three estimates are made. Attention between means of tokens follows each query block, but not what single tokens
    look at. The true attention of the last queries does, of which every other one of the last ``block_size`` is taken:
    summed over columns, for heads that look at certain tokens wherever they are, and over diagonals of blocks, for
    heads that look a certain distance back.

    Which of them holds differs from head to head. So each head has weights of its own for six parts: the three
    estimates, the geometric means of the first with either other, which know what both agree on, and even shares. They
    are the weights under which the true attention of a few queries, spread over the whole prompt, is the likeliest:
    those of a mixture of distributions, found in ten steps of expectation maximisation.

    What the last queries look at is known for themselves, i.e. for the last query block and, if that is shorter than
    others, for the one before it: a question at the end finds what it asks for. It may be a few tokens, whose attention
    a mean over the block hides, so blocks to which one of them gives a twentieth of its attention are kept, too.

    The threshold is the same for all heads, so a head that looks at few blocks keeps nearly all of its attention, and
    one that spreads it thin keeps less: that takes fewer blocks for the same share of the attention, on average. Where
    each head has to hold a share of its own, take [`flex_prefill`](flex_prefill.md).

    Args:
        threshold (float | None): share of its attention that a query block must give to a block, in [0, 1]; 0 keeps
            everything. Default: half of an even share, i.e. of 1 / n_k, which falls with the length of the prompt as
            the shares of blocks do.
        pool_size (int | None): tokens in a mean, a power of two from 16 to the block size: see
            :class:`~sparse_prefill.estimators.PooledAttention`. Default: the fewest that leave at most 1,024 means of
            keys, i.e. 16 up to 16K tokens and all of a block from 128K on, so that a head's estimate stays as small.
        sink (int): first tokens that every query keeps. Default: 1, i.e. the first block.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range; at a call, if the prompt is of several documents.
    """

    paper = "no paper of its own: the estimates are those of MInference and FlexPrefill (arXiv 2502.20766)"
    use = """
For the most attention in the fewest blocks: the estimate costs two means, one small product and the attention of half a
block of queries and of 32 more, and selection is a comparison. Lower the threshold for more. Heads of diffuse attention
give way first: look at the worst heads' recall, or [calibrate](../calibration.md) a threshold for each.
"""
    differs = "There is no released code to differ from."
    chunk_invariant = False
    head_independent = True
    crossover = 2048
    tunable = TunableOption("threshold", 1.0, 1e-7, scale="log")

    threshold: float | None = None
    pool_size: int | None = None
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            Threshold(threshold=self.threshold)
        PooledAttention(pool_size=self.pool_size)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> _Scores:
        check_one_document("mean_slash", "its representative queries would all lie in the last one", prompt)
        vertical, slash, _, peak = RepresentativeMass(stride=STRIDE)(q, k, prompt)
        blocks, mass = spread_queries(q, k, prompt)
        columns, diagonals = vertical[:, :, None], by_diagonal(slash, prompt)
        pooled = PooledAttention(pool_size=self.pool_size or _pool_size(prompt))(q, k, prompt)
        visible = prompt.visible(q.device)
        weights = _weights(pooled[:, :, blocks], columns, diagonals[:, :, blocks], visible[:, :, blocks], mass)
        at_once = max(1, ENTRIES // (pooled.shape[0] * pooled.shape[1] * prompt.n_k))
        rows = (slice(begin, begin + at_once) for begin in range(0, prompt.n_q, at_once))
        mixed = [_mixture(pooled[:, :, i], columns, diagonals[:, :, i], visible[:, :, i], weights) for i in rows]
        shares = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)
        last = _last(prompt)
        shares[:, :, last] = _among(visible[:, :, last], columns)
        return _Scores(shares, peak)

    def select(self, scores: _Scores, prompt: Prompt) -> Tensor:
        threshold = EVEN / prompt.n_k if self.threshold is None else self.threshold
        keep, last = Threshold(threshold=threshold)(scores.shares, prompt), _last(prompt)
        keep[:, :, last] |= (scores.peak >= PEAK)[:, :, None] & prompt.visible(keep.device)[:, :, last]
        return keep

    def score_table(self, scores: _Scores, prompt: Prompt) -> Tensor:
        return scores.shares


def _last(prompt: Prompt) -> slice:
    """The query blocks of the last ``block_size`` queries."""
    return slice(max(0, prompt.q_len - prompt.block_size) // prompt.block_size, None)


def _pool_size(prompt: Prompt) -> int:
    tokens = -(-prompt.kv_len // MEANS)
    return min(max(16, 1 << (tokens - 1).bit_length()), prompt.block_size)


def _parts(pooled: Tensor, columns: Tensor, diagonals: Tensor, visible: Tensor) -> Iterator[Tensor]:
    """What the parts give to blocks, one after the other: [B, Hq, m, n_k] each."""
    yield _among(visible, pooled)
    yield _among(visible, columns)
    yield _among(visible, diagonals)
    yield _among(visible, (pooled * columns).sqrt())
    yield _among(visible, (pooled * diagonals).sqrt())
    yield _among(visible, torch.ones_like(pooled))


def _among(visible: Tensor, x: Tensor) -> Tensor:
    """Shares of x in its sum over visible blocks [..., m, n_k]; others have 0."""
    x = torch.where(visible, x, 0.0)
    return x / x.sum(-1, keepdim=True).clamp(min=TINY)


@compile_on_gpu
def _weights(pooled: Tensor, columns: Tensor, diagonals: Tensor, visible: Tensor, mass: Tensor) -> Tensor:
    """The likeliest weights of the parts, given the attention of some query blocks.

    Args:
        pooled (Tensor): fp32 [B, Hq, m, n_k], attention between means, of these query blocks.
        columns (Tensor): fp32 [B, Hq, 1, n_k], of the last queries.
        diagonals (Tensor): fp32 [B, Hq, m, n_k], likewise, where they meet these query blocks.
        visible (Tensor): bool [B or 1, 1, m, n_k].
        mass (Tensor): fp32 [B, Hq, m, n_k], their true attention.

    Returns:
        Tensor: fp32 [6, B, Hq, 1, 1], the sum of the six is 1.
    """
    parts = torch.stack(list(_parts(pooled, columns, diagonals, visible)))  # [6, B, Hq, m, n_k]
    total = mass.sum(-1, keepdim=True).sum(-2, keepdim=True) + len(parts) * PRIOR
    weights = parts.new_full((len(parts), *pooled.shape[:2], 1, 1), 1 / len(parts))
    for _ in range(STEPS):
        ratio = mass / (weights * parts).sum(0).clamp(min=TINY)
        taken = weights * (parts * ratio).sum(-1, keepdim=True).sum(-2, keepdim=True)  # in all, as much as there is
        weights = (taken + PRIOR) / total
    return weights


@compile_on_gpu
def _mixture(pooled: Tensor, columns: Tensor, diagonals: Tensor, visible: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the parts of all query blocks: fp32 [B, Hq, n_q, n_k]. Arguments as for :func:`_weights`.

    Under a sliding window, blocks may see no column of the last queries, and the other parts share that one's weight.
    """
    mixed = torch.zeros_like(pooled)
    for weight, part in zip(weights, _parts(pooled, columns, diagonals, visible), strict=True):
        mixed = mixed + weight * part
    return _among(visible, mixed)

"""A mixture of block means, columns and diagonals, with weights by head, and one threshold for all heads."""

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

EVEN = 0.5  # default threshold, in even shares of attention, 1 / n_k each
PEAK = 0.05  # share of its attention that one of the last queries gives to a block that is then kept for them
MEANS = 1024  # most means of keys, unless blocks are no finer
STRIDE = 2  # every other one of the last queries: on average they say nearly as much as all of them
STEPS = 10  # of expectation maximisation: more steps hardly change the weights
ENTRIES = 2**25  # entries of the table that are mixed at once: a CPU holds a few tables of this size
PRIOR = 1e-4  # attention added to each part, in queries: without any sampled attention all parts weigh the same


class _Scores(NamedTuple):
    shares: Tensor  # fp32 [B, Hq, n_q, n_k], estimated share of a query block's attention
    peak: Tensor  # fp32 [B, Hq, n_k], the largest share that one of the last queries gives to a block


@register_strategy("mean_slash")
@former_options(grain="pool_size")
@dataclass(frozen=True, kw_only=True)
class MeanSlash(Strategy):
    """Keep the blocks that get at least a ``threshold`` of a query block's attention by a mixture of cheap estimates.

    There are three estimates of the attention from query block i to key block j:

    * A(i, j), attention between the means of tokens. It follows each query block, but misses single tokens.
    * C(j), true attention of the last queries, summed by key block: *columns*, for heads that look at certain tokens.
    * D(i, j), the same attention, summed by block diagonal: *diagonals*, for heads that look a certain distance back.

    C and D take every other one of the last ``block_size`` queries. Which estimate holds differs by head, so each
    head mixes six parts with its own weights:

    ```text
    p_1 = A    p_2 = C    p_3 = D    p_4 = sqrt(A C)    p_5 = sqrt(A D)    p_6 = 1
    each divided by its sum over the key blocks j that are visible in row i

    s(i, j) = sum over a of w_a p_a(i, j)           keep (i, j) if s(i, j) >= threshold
    ```

    The weights maximise the likelihood of the true attention m(i, j) of a few sampled queries, spread over the
    prompt. They start at 1/6 and take ten steps of expectation maximisation, with a prior of e = 1e-4:

    ```text
    w_a  <-  (e + sum over i, j of m(i, j) w_a p_a(i, j) / s(i, j)) / (6 e + sum over i, j of m(i, j))
    ```

    The last query block, and the one before it if the last is ragged, use C in place of s: it is their own attention,
    so a question at the end finds what it asks for. A question may be a few tokens, which a mean over the block hides.
    So these query blocks also keep each block to which one of the last queries gives a twentieth of its attention.

    All heads have the same threshold. A head that looks at few blocks keeps nearly all of its attention, and a diffuse
    head keeps less. On average, this needs fewer blocks for the same share of the attention. If each head has to hold
    a given share, take [`flex_prefill`](flex_prefill.md).

    Args:
        threshold (float | None): least estimated share of a query block's attention for a block to be kept, in
            [0, 1]; 0 keeps everything. Default: half of an even share, 0.5 / n_k, which falls with the prompt's length
            as the shares do.
        pool_size (int | None): tokens in a mean, a power of two from 16 to the block size: see
            :class:`~sparse_prefill.estimators.PooledAttention`. Default: the fewest that leave at most 1,024 means of
            keys, i.e. 16 up to 16K tokens and all of a block from 128K on, so that a head's estimate stays as small.
        sink (int): first tokens that every query keeps. Default: 1, i.e. the first block.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range; at a call, if the prompt has several documents.
    """

    paper = "no paper: the estimates are those of MInference and FlexPrefill (arXiv 2502.20766)"
    use = """
Take it for the most attention in the fewest blocks. The estimate costs two means, one small product, and the attention
of half a block of queries and of 32 more; the selection is one comparison. A lower threshold keeps more. Diffuse heads
lose recall first: look at the worst heads, or [calibrate](../calibration.md) a threshold for each.
"""
    differs = "There is no released code."
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
    """The six parts, one after the other: distributions over visible key blocks, [B, Hq, m, n_k] each."""
    yield _among(visible, pooled)
    yield _among(visible, columns)
    yield _among(visible, diagonals)
    yield _among(visible, (pooled * columns).sqrt())
    yield _among(visible, (pooled * diagonals).sqrt())
    yield _among(visible, torch.ones_like(pooled))


def _among(visible: Tensor, x: Tensor) -> Tensor:
    """x [..., m, n_k] divided by its sum over visible blocks, and 0 in others."""
    x = torch.where(visible, x, 0.0)
    return x / x.sum(-1, keepdim=True).clamp(min=TINY)


@compile_on_gpu
def _weights(pooled: Tensor, columns: Tensor, diagonals: Tensor, visible: Tensor, mass: Tensor) -> Tensor:
    """The weights of the parts, by expectation maximisation: see :class:`MeanSlash`.

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
        taken = weights * (parts * ratio).sum(-1, keepdim=True).sum(-2, keepdim=True)  # sums to all of the mass
        weights = (taken + PRIOR) / total
    return weights


@compile_on_gpu
def _mixture(pooled: Tensor, columns: Tensor, diagonals: Tensor, visible: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the parts of all query blocks: fp32 [B, Hq, n_q, n_k]. Arguments as for :func:`_weights`.

    Under a sliding window, a query block may see no column of the last queries. The other parts then share its weight.
    """
    mixed = torch.zeros_like(pooled)
    for weight, part in zip(weights, _parts(pooled, columns, diagonals, visible), strict=True):
        mixed = mixed + weight * part
    return _among(visible, mixed)

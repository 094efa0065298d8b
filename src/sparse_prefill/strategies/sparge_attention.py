"""SpargeAttention: attention between block means, for blocks whose tokens are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_finite, check_fraction
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators import dissimilar_blocks, key_means, pooled_attention, query_means
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import CumulativeMass, top_k
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


class _Scores(NamedTuple):
    pooled: Tensor  # fp32 [B, Hq, n_q, n_k], 0 in the columns of dissimilar key blocks
    rows: Tensor  # dissimilar query blocks, bool [B, Hq, n_q, 1]
    columns: Tensor  # dissimilar key blocks, bool [B, Hq, 1, n_k]


@register_strategy("sparge_attention")
@dataclass(frozen=True, kw_only=True)
class SpargeAttention(Strategy):
    """SpargeAttention: select among blocks of similar tokens by attention between means, and keep all other blocks.

    A mean represents a block only if its tokens are similar, i.e. if their mean cosine similarity is above
    ``similarity``:

    ```text
    P(i, j) = softmax over the similar blocks j of (mean query of block i) . (mean key of block j) / sqrt(D)
    keep, in each row i, the fewest similar j with sum of P(i, j) >= cdf, or the highest topk share of them
    keep all (i, j) where block i or block j is not similar
    ```

    ``cdf`` refers to the attention between means, not to the true attention. Means and similarity leave out padding.
    A prompt in chunks of whole blocks selects the same blocks as in one piece. In one table for packed documents, a
    block in which two documents meet is averaged over both; the kept blocks are still visible ones.

    The published 0.6 and 0.98 are the defaults. A sink of one token is ours: the mean of the first block hides the sink
    token, and without the guard most heads of the language model that we measured lost it.

    Args:
        similarity (float): mean cosine similarity of a block's tokens above which its mean is used. A negative value
            uses the means of all blocks, one above 1 uses none. Default: 0.6.
        cdf (float): share of the softmax over the similar blocks to keep, in (0, 1]. Default: 0.98.
        topk (float | None): keep this share of the visible similar blocks instead, in (0, 1], rounded up. Published is
            0.5 with a ``similarity`` of -0.1. Default: none, ``cdf`` decides.
        sink (int): first tokens that every query keeps. Default: 1, i.e. the first block.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "SpargeAttention, Zhang et al., ICML 2025 (arXiv 2502.18137)"
    reference = "thu-ml/SpargeAttn@bfd980b: get_block_map_meansim"
    use = """
Take it for pooled attention with a safeguard: blocks that a mean doesn't represent are always computed. With rotary
embeddings, the keys of a block differ already by their rotation, so similarity depends more on the head than on the
block. Heads below the threshold run nearly dense: look at the density of each layer, and lower `similarity` if it costs
too much. The method was made for video as well as for text. The wrapper `similarity_guard` adds the same guard to any
strategy.
"""
    differs = """
Only the selection of blocks is here: the released kernel also skips products inside a kept block, and computes in 8
bits. It has query blocks of 128 and key blocks of 64; ours are square, so `block_size=64` is finer and 128 coarser.
`topk` counts the similar blocks that are visible in a row. The sink is optional there, and on by default here.
"""
    chunk_invariant = True
    head_independent = True
    crossover = 2048
    tunable = TunableOption("cdf", 0.01, 1.0)

    similarity: float = 0.6
    cdf: float = 0.98
    topk: float | None = None
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("similarity", self.similarity)
        check_fraction("cdf", self.cdf)
        if self.topk is not None:
            check_fraction("topk", self.topk)

    def tunable_option(self) -> TunableOption | None:
        return self.tunable if self.topk is None else None  # topk replaces cdf

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> _Scores:
        rows, columns = dissimilar_blocks(q, k, prompt, self.similarity)
        pooled = pooled_attention(query_means(q, prompt), key_means(k, prompt), prompt, among=~columns)
        return _Scores(pooled, rows, columns)

    def select(self, scores: _Scores, prompt: Prompt) -> Tensor:
        pooled, rows, columns = scores
        if self.topk is None:
            kept = CumulativeMass(share=self.cdf)(pooled, prompt)
        else:
            similar = prompt.visible(pooled.device) & ~columns
            count = (self.topk * similar.sum(-1, keepdim=True).double()).ceil()
            kept = top_k(pooled.masked_fill(~similar, -torch.inf), count)
        return kept | rows | columns

    def score_table(self, scores: _Scores, prompt: Prompt) -> Tensor:
        return scores.pooled

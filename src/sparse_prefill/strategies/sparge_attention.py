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
    """SpargeAttention: pooled attention decides over blocks whose tokens are alike; all others are kept.

    A mean stands for a block only if the block's tokens are alike, that is, if their mean cosine similarity is above
    ``similarity``. Key blocks that aren't take no part in the softmax between block means and are kept by every row;
    query blocks that aren't keep all they see. Of the other blocks each row keeps the fewest that hold ``cdf`` of the
    softmax, or the highest ``topk`` share.

    The share is of the attention between means, not of the true attention. Padding is left out of means and similarity.
    A prompt that is prefilled in chunks of whole blocks selects what it selects in one piece. In one table for packed
    documents, a block in which two documents meet is averaged over both; what is kept still lies within sight.

    The published 0.6 and 0.98 are the defaults. A sink of one token is ours: the mean of the first block doesn't show
    the sink token in it, and without the guard most heads of the language model that we measured lost it.

    Args:
        similarity (float): mean cosine similarity, of the tokens of a block, above which its mean is trusted. Means
            of all blocks are trusted under 0, none above 1. Default: 0.6.
        cdf (float): share of the softmax over the similar blocks to keep, in (0, 1]. Default: 0.98.
        topk (float | None): keep this share of the similar blocks in sight instead, in (0, 1], rounded up; published
            is 0.5 with a ``similarity`` of -0.1. Default: none, ``cdf`` decides.
        sink (int): first tokens that every query keeps. Default: 1, i.e. the first block.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "SpargeAttention, Zhang et al., ICML 2025 (arXiv 2502.18137)"
    reference = "thu-ml/SpargeAttn@bfd980b: get_block_map_meansim"
    use = """
Where pooled attention is to be had with a warning light: blocks that a mean can't stand for are computed instead of
guessed. With rotary embeddings keys of a block differ by their rotation alone, and similarity is more a matter of the
head than of the block: heads below the threshold run nearly dense, so look at the density of each layer and lower
`similarity` where it costs too much. It was made for video as much as for text. The wrapper `similarity_guard` adds the
same guard to any other strategy.
"""
    differs = """
Only the choice of blocks is here: the released kernel also skips products inside a kept block, and computes in 8 bits.
It has query blocks of 128 and key blocks of 64; ours are square, so that `block_size=64` is the finer and 128 the
coarser relative. `topk` counts the similar blocks in a row's sight. The sink is optional there and on here.
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

"""FlashPrefill: single queries against block means, and a threshold relative to the highest score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators import TokenByMean
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import MaxRelative
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@register_strategy("flash_prefill")
@dataclass(frozen=True, kw_only=True)
class FlashPrefill(Strategy):
    """FlashPrefill: keep the blocks that score at least ``alpha`` times the highest of the query block.

    Every query token is compared with the mean key of each block, by ``exp(q . mean / sqrt(D))``, so that a single
    query that looks at a block counts where a mean over queries would drown it. The scores of a query block are the
    sums over its queries; what to keep is decided by the highest of them, without sorting. Scores are those of
    :class:`~sparse_prefill.estimators.TokenByMean`.

    A query scores the blocks that end at or before it and leaves those that it lies in to the guards, which default to
    the published ones for blocks of 128: two sink blocks, a window of four blocks and the last two query blocks dense.
    A mean hides single keys: a block in which one key is looked at by all has the score of its mean. The exponentials
    aren't divided by each query's own sum, so queries of small logits have little say in what their block keeps. A
    smaller ``alpha`` keeps all that a larger one keeps, and more.

    A prompt that is prefilled in chunks of whole blocks selects what it selects in one piece, but for ``last``, which
    counts in each chunk. In one table for packed documents, a query scores the blocks that lie wholly in its own
    document; the block that a document begins in is kept by ``sink``.

    Args:
        alpha (float): share of the highest score that a block must reach, in [0, 1]. Published are 0.18 for
            Llama-3.1-8B, 0.12 for Qwen3-30B-A3B and 0.08 for Qwen2.5-7B. 0 keeps everything, 1 the highest block and
            the guards. Default: 0.08, the one that keeps most.
        per_group (bool): select once for all query heads of a key head, by the sums over the queries of all of them.
            Default: False: each query head by itself.
        sink (int): first tokens that every query keeps. Default: 256, i.e. two blocks.
        local (int): nearest keys that every query keeps. Default: 384: a query's own block and the three before it.
        last (int): last query tokens that keep every key. Default: 129, which always lie in the last two query blocks.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "FlashPrefill, 2026 (arXiv 2603.06199); its second version: arXiv 2608.19758"
    reference = (
        "qhfan/FlashPrefill@74e42f3: ops/flashprefill_native_forward.py; qhfan/FlashPrefillv2@0f8e791: prefill.py"
    )
    use = """
A good first choice beside `flex_prefill` and `xattention`: the estimate is one thin matrix product, and the selection
neither sorts nor sums. On prompts of few blocks the guards keep most of what is kept: at 64 blocks they alone keep
about a quarter, which is why it comes into its own on longer ones. The right `alpha` differs by model; measure it with
[`evaluation.density` and `evaluation.recall`](../api.md#measures).

With `per_group=True` the heads that read the same keys read the same blocks: the head of the largest logits decides for
the others. That suits kernels that load a block of keys once for all of them, which the one here doesn't.
"""
    differs = """
The selection is that of the first version. The released code runs whole prompts only; chunks, prefixes, left padding
and packed documents are served here. Its minimum number of blocks a row, off by default, is left out. Guards count
tokens here and are rounded out to blocks: a window of 384 keys reaches three blocks behind the query's own, one of 385
or more reaches four.

`per_group=True` is how the second version shares its lists. There a tile is 128 rows, of `128 / G` positions times the
`G` heads of a group, and a query scores the blocks that begin at or before it; here it is `G` times the positions of a
query block, and queries score the blocks that end at or before them. Its correction for what is skipped is the wrapper
`mean_correction`; its last eight blocks of dense queries are `last=897`, and its dense first layers are those of a
`Plan`.
"""
    chunk_invariant = True
    head_independent = True
    crossover = 2048
    tunable = TunableOption("alpha", 1.0, 1e-12, scale="log")

    alpha: float = 0.08
    per_group: bool = False
    sink: int = 256
    local: int = 384
    last: int = 129

    def __post_init__(self) -> None:
        super().__post_init__()
        MaxRelative(alpha=self.alpha)
        TokenByMean(per_group=self.per_group)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return TokenByMean(per_group=self.per_group)(q, k, prompt)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return MaxRelative(alpha=self.alpha)(scores, prompt)

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

    Every query token is compared with the mean key of each block, so a single query that looks at a block counts; a
    mean over queries would hide it. Selection needs no sorting:

    ```text
    S(i, j) = sum over queries q of block i of exp(q . mean key of block j / sqrt(D))
    keep (i, j) if S(i, j) >= alpha * max over j' of S(i, j')
    ```

    See :class:`~sparse_prefill.estimators.TokenByMean`. A query scores the blocks that end at or before it. The guards
    keep the others; they default to the published ones for blocks of 128: two sink blocks, a window of four blocks,
    and the last two query blocks dense. A mean hides single keys. The exponentials aren't divided by each query's own
    sum, so queries with small logits have little influence on their block. A smaller ``alpha`` keeps all that a larger
    one keeps, and more.

    A prompt in chunks of whole blocks selects the same blocks as in one piece, except for ``last``, which counts in
    each chunk. In one table for packed documents, a query scores the blocks that lie wholly in its own document, and
    ``sink`` keeps the block in which the document begins.

    Args:
        alpha (float): share of the highest score that a block must reach, in [0, 1]. Published are 0.18 for
            Llama-3.1-8B, 0.12 for Qwen3-30B-A3B and 0.08 for Qwen2.5-7B. 0 keeps everything, 1 the highest block and
            the guards. Default: 0.08, which keeps most of these.
        per_group (bool): select once for all query heads of a key head, by the sums over the queries of all of them.
            Default: False.
        sink (int): first tokens that every query keeps. Default: 256, i.e. two blocks.
        local (int): nearest keys that every query keeps. Default: 384: a query's own block and the three before it.
        last (int): last query tokens that keep every key. Default: 129, i.e. the last two query blocks at any length.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "FlashPrefill, 2026 (arXiv 2603.06199); its second version: arXiv 2608.19758"
    reference = (
        "qhfan/FlashPrefill@74e42f3: ops/flashprefill_native_forward.py; qhfan/FlashPrefillv2@0f8e791: prefill.py"
    )
    use = """
A good first choice beside `flex_prefill` and `xattention`. The estimate is one thin matrix product, and the selection
neither sorts nor sums. It suits long prompts: at 64 blocks, the guards already keep about a quarter of all blocks. The
right `alpha` differs by model; measure it with [`evaluation.density` and `evaluation.recall`](../api.md#measures).

With `per_group=True`, the heads of a key head keep the same blocks, and the head with the largest logits decides for
the others. That suits kernels that load a block of keys once for the whole group. The kernel here doesn't.
"""
    differs = """
The selection equals the first version. The released code runs only whole prompts; chunks, prefixes, left padding and
packed documents are served here. Its minimum number of blocks in a row, off by default, is left out. Guards count
tokens here and are rounded out to blocks: a window of 384 keys reaches three blocks before the query's own, one of 385
reaches four.

`per_group=True` follows the second version, with two differences. There a tile has 128 rows, the `G` heads of a group
at `128 / G` positions, and a query scores the blocks that begin at or before it. Here a tile has the `G` heads at all
positions of a query block, and a query scores the blocks that end at or before it. Other parts of the second version
are the wrapper `mean_correction`, `last=897` for its last eight dense query blocks, and a `Plan` for its dense first
layers.
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

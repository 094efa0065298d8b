"""FlashPrefill: single queries against block means, and a threshold relative to the highest score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.estimators import TokenByMean
from sparse_prefill.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import MaxRelative
from sparse_prefill.strategy import Strategy


@register_strategy("flash_prefill")
@dataclass(frozen=True, kw_only=True)
class FlashPrefill(Strategy):
    """FlashPrefill (V1): keep the blocks that score at least ``alpha`` times the highest of the query block.

    Scores are those of :class:`~sparse_prefill.estimators.TokenByMean`. The guards default to the published ones for
    blocks of 128: two sink blocks, a window of four blocks and the last two query blocks dense. Guards are rounded out
    to blocks: 384 keys reach three blocks behind a query's own, and the last 129 queries always lie in two.

    Args:
        alpha (float): share of the highest score that a block must reach, in [0, 1]. Published are 0.18 for
            Llama-3.1-8B, 0.12 for Qwen3-30B-A3B and 0.08 for Qwen2.5-7B. Default: 0.08.
        sink (int): first tokens that every query keeps. Default: 256.
        local (int): nearest keys that every query keeps. Default: 384.
        last (int): last query tokens that keep every key. Default: 129.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "FlashPrefill, 2026 (arXiv 2603.06199)"

    alpha: float = 0.08
    sink: int = 256
    local: int = 384
    last: int = 129

    def __post_init__(self) -> None:
        super().__post_init__()
        MaxRelative(alpha=self.alpha)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return TokenByMean()(q, k, prompt)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return MaxRelative(alpha=self.alpha)(scores, prompt)

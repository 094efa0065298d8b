"""Block means against block means, and a share of the mass: the plainest method that looks at the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.estimators import PooledAttention
from sparse_prefill.options import check_fraction
from sparse_prefill.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import CumulativeMass
from sparse_prefill.strategy import Strategy


@register_strategy("mean_pool")
@dataclass(frozen=True, kw_only=True)
class MeanPool(Strategy):
    """Keep, in each query block, the fewest key blocks that hold a share of the attention between block means.

    The baseline of methods that estimate: two means and one small matrix product a head. A mean hides what single
    tokens of a block look at or offer.

    Args:
        share (float): share of the pooled attention to keep, in (0, 1]. Default: 0.9.
        sink (int): first tokens that every query keeps. Default: 1, i.e. the first block.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "baseline of block means, no paper of its own"

    share: float = 0.9
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("share", self.share)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return PooledAttention()(q, k, prompt)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return CumulativeMass(share=self.share)(scores, prompt)

"""Block means against block means, and a share of the mass: the plainest method that looks at the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.core.option_checks import check_fraction
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators import PooledAttention
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import CumulativeMass
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@register_strategy("mean_pool")
@dataclass(frozen=True, kw_only=True)
class MeanPool(Strategy):
    """Keep, in each query block, the fewest key blocks that hold a share of the attention between block means.

    The queries of a block are averaged, the keys of a block likewise, and attention between the means stands for that
    between the tokens. It is the plainest method that looks at the prompt: two means and one small matrix product a
    head, made of the estimator ``pooled_attention`` and the selector ``cumulative``.

    The share is of the attention between means, not of the true attention: a mean hides what single tokens of a block
    look at or offer. Padding is left out of the means. A prompt that is prefilled in chunks of whole blocks selects
    what it selects in one piece. In one table for packed documents, the means of a block in which two documents meet
    are over tokens of both; the blocks that it keeps still lie within sight.

    Args:
        share (float): share of the pooled attention to keep, in (0, 1]. Default: 0.9.
        sink (int): first tokens that every query keeps. Default: 1, i.e. the first block.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "baseline of block means, no paper of its own"
    use = """
A baseline: a method that looks closer has to beat it at the same density. [`oracle`](oracle.md) keeps a share of the
true attention instead; `evaluation.recall` measures how far the share of the means falls short of it.
"""
    differs = "There is no released code to differ from: methods that average blocks each add something of their own."
    chunk_invariant = True
    head_independent = True
    crossover = 2048
    tunable = TunableOption("share", 0.01, 1.0)

    share: float = 0.9
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("share", self.share)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return PooledAttention()(q, k, prompt)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return CumulativeMass(share=self.share)(scores, prompt)

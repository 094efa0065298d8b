"""A share of the attention between block means: the simplest method that looks at the prompt."""

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

    ```text
    P(i, j) = softmax over j of (mean query of block i) . (mean key of block j) / sqrt(D)
    keep, in each row i, the fewest j with sum of P(i, j) >= share
    ```

    It is the simplest method that looks at the prompt: two means and one small matrix product for each head. It
    combines the estimator ``pooled_attention`` and the selector ``cumulative``.

    ``share`` refers to the attention between means, not to the true attention: a mean hides single tokens. Padding is
    left out of the means. A prompt in chunks of whole blocks selects the same blocks as in one piece. In one table for
    packed documents, a block in which two documents meet has one mean over tokens of both; the kept blocks are still
    visible ones.

    Args:
        share (float): share of the pooled attention to keep, in (0, 1]. Default: 0.9.
        sink (int): first tokens that every query keeps. Default: 1, i.e. the first block.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "baseline of block means, no paper"
    use = """
A baseline: a finer method has to beat it at the same density. [`oracle`](oracle.md) keeps a share of the
true attention instead; `evaluation.recall` measures how far the share of the means falls short of it.
"""
    differs = "There is no released code: each published method that averages blocks adds a rule to it."
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

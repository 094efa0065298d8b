"""The blocks that truly hold the attention: what a perfect estimator would keep."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.core.option_checks import check_fraction
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators import TrueMass
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import CumulativeMass
from sparse_prefill.selectors.cumulative import Scope
from sparse_prefill.strategies._by_options import ByOptions
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@register_strategy("oracle")
@dataclass(frozen=True, kw_only=True)
class Oracle(Strategy):
    """Keep, in each query block, the fewest key blocks that hold a share of its true attention mass.

    It computes the dense attention probabilities first, sums them by block, and takes the highest. Besides each row's
    own block, no selection holds that share in fewer blocks.

    A query block that keeps the share has that share of its rows' attention *on average*; a single row may have less.
    Guards come on top of what is selected. A prompt that is prefilled in chunks of whole blocks selects what it selects
    in one piece, with ``scope="row"``.

    Args:
        share (float): share of the mass to keep, in (0, 1]. Default: 0.95.
        scope (str): "row" meets the share in each query block, "head" on average over a head, with fewer blocks.
            Default: "row".
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "upper bound of block selection, no method"
    use = """
A yardstick, never to save time: it is slower than dense attention. Its density at some recall is the least that any
selection of blocks can reach, and its output at some density shows what a model loses to block sparsity as such.
"""
    differs = "There is no released code to differ from: it is the true attention, summed by block."
    chunk_invariant = ByOptions(True, lambda self: self.scope == "row")  # else a chunk spends its own budget
    head_independent = True
    crossover = 8192
    tunable = TunableOption("share", 0.01, 1.0)

    share: float = 0.95
    scope: Scope = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("share", self.share)
        CumulativeMass(scope=self.scope)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return TrueMass()(q, k, prompt)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return CumulativeMass(share=self.share, scope=self.scope)(scores, prompt)

"""The blocks of a perfect estimator: those with the most true attention."""

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

    It computes the dense attention probabilities, sums them by block, and takes the highest. Apart from each row's own
    block, which is always kept, no selection holds that share in fewer blocks.

    A query block keeps the share of its rows' attention *on average*; a single row may keep less. Guards are added to
    the selection. With ``scope="row"``, a prompt in chunks of whole blocks selects the same blocks as in one piece.

    Args:
        share (float): share of the mass to keep, in (0, 1]. Default: 0.95.
        scope (str): "row" keeps the share in each query block, "head" on average over a head, with fewer blocks.
            Default: "row".
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "upper bound of block selection, no method"
    use = """
For measurements only: it is slower than dense attention. Its density at a given recall is the least that any selection
of blocks can reach. Its output at a given density shows how much a model loses by block sparsity itself.
"""
    differs = "There is no released code: it is the true attention, summed by block."
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

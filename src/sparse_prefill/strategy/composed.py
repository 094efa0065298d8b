"""Strategies that are put together from an estimator and a selector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.strategy.base import Strategy

Estimator = Callable[[Tensor, Tensor, Prompt], Any]
Selector = Callable[[Any, Prompt], Tensor]


@dataclass(frozen=True, kw_only=True)
class ComposedStrategy(Strategy):
    """An estimator and a selector as one strategy, for methods that need no class.

    Args:
        estimator (Estimator): called as ``estimator(q, k, prompt)``.
        selector (Selector): called as ``selector(scores, prompt)``.
        **guards: see :class:`Strategy`.
    """

    estimator: Estimator
    selector: Selector

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Any:
        return self.estimator(q, k, prompt)

    def select(self, scores: Any, prompt: Prompt) -> Tensor:
        return self.selector(scores, prompt)

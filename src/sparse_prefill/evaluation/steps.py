"""What the measurements of a model share: their strategies, and how far they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sparse_prefill.plan import Plan, with_options
from sparse_prefill.strategy import Strategy, get_strategy

Strategies = Mapping[str, Strategy | Plan]
OnStep = Callable[[int, int, str], None]
Failures = dict[str, str]


def with_dense(strategies: Strategies) -> dict[str, Strategy | Plan]:
    """The strategies with the dense model in front of them."""
    return {"dense": get_strategy("dense"), **strategies}


def sparse_at_any_length(strategy: Strategy | Plan) -> Strategy | Plan:
    """The strategy or plan with ``min_length=0``, for tensors of no model; models have windows that run dense in use.

    See :func:`~sparse_prefill.models.at_length.sparse_at_length` for those.
    """
    return with_options(strategy, min_length=0)


class Steps:
    """Counts steps, and tells somebody."""

    def __init__(self, on_step: OnStep | None, total: int) -> None:
        self.on_step, self.total, self.done = on_step, total, 0

    def __call__(self, text: str) -> None:
        if self.on_step is not None:
            self.on_step(self.done, self.total, text)
        self.done += 1

    def skip_to_next(self, size: int) -> None:
        """Count what is left of a group of steps as done."""
        self.done = -(-self.done // size) * size

"""What all measurements of a model share: strategies, progress, and strategies that fail."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from sparse_prefill.evaluation.results import Results
from sparse_prefill.plan import Plan, with_options
from sparse_prefill.strategy import Strategy, get_strategy

Strategies = Mapping[str, Strategy | Plan]
OnStep = Callable[[int, int, str], None]
Failures = dict[str, str]


def with_dense(strategies: Strategies) -> dict[str, Strategy | Plan]:
    """The strategies, with the dense model before them."""
    return {"dense": get_strategy("dense"), **strategies}


def sparse_at_any_length(strategy: Strategy | Plan) -> Strategy | Plan:
    """The strategy or plan with ``min_length=0``, for tensors that come from no model.

    In models this would also run short sliding windows sparse, which run dense in use: see
    :func:`~sparse_prefill.models.at_length.sparse_at_length`.
    """
    return with_options(strategy, min_length=0)


def reported_failures(names: Collection[str], errors: Mapping[str, Exception], results: Results) -> Failures:
    """Write the errors of strategies into their report, and return them as text.

    Args:
        names (Collection[str]): the strategies that were measured, or tried.
        errors (Mapping[str, Exception]): the error of each strategy that failed.
        results (Results): the report.

    Raises:
        RuntimeError: if all strategies but "dense" failed with the same one, as where the attention kernel can't run.
    """
    failures = {name: str(error) for name, error in errors.items()}
    results.report_failures(names, failures)
    found = [errors.get(name) for name in names if name != "dense"]
    if found and isinstance(found[0], RuntimeError) and len({(type(error), str(error)) for error in found}) == 1:
        raise found[0]
    return failures


class Steps:
    """Counts steps and reports them.

    Args:
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each step.
        total (int): number of steps.
    """

    def __init__(self, on_step: OnStep | None, total: int) -> None:
        self.on_step, self.total, self.done = on_step, total, 0

    def __call__(self, text: str) -> None:
        if self.on_step is not None:
            self.on_step(self.done, self.total, text)
        self.done += 1

    def skip_to_next(self, size: int) -> None:
        """Count the remaining steps of a group as done."""
        self.done = -(-self.done // size) * size

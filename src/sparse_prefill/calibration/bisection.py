"""Bisection over the steps of a scale."""

from __future__ import annotations

from collections.abc import Callable


def first_step(measure: Callable[[int], float], steps: int, target: float) -> int | None:
    """The first step whose measure reaches a target, by bisection.

    Args:
        measure (Callable[[int], float]): the measure of a step in [0, steps); it must not decrease with the step.
        steps (int): number of steps, at least 1.
        target (float): the measure to reach.

    Returns:
        int | None: the step, or None if the last step doesn't reach the target. About log2(steps) steps are measured.

    Example:
        >>> first_step(lambda step: step / 100, 101, 0.42)
        42
    """
    if measure(0) >= target:
        return 0
    below, reached = 0, steps - 1
    if below == reached or measure(reached) < target:
        return None
    while reached - below > 1:
        middle = (below + reached) // 2
        if measure(middle) < target:
            below = middle
        else:
            reached = middle
    return reached

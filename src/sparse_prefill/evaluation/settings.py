"""Settings of a strategy near some densities, and the density for a recall between settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

CLOSE = 0.01  # largest distance of densities that count as near
DIGITS = 6  # of the measures of a setting


def nearest_steps(measure: Callable[[int], float], steps: int, targets: Sequence[float]) -> list[int]:
    """Steps whose measures are near some targets, by bisection.

    Args:
        measure (Callable[[int], float]): the measure of a step in [0, steps); it must not decrease with the step.
        steps (int): number of steps, at least 1.
        targets (Sequence[float]): the measures to come near.

    Returns:
        list[int]: steps in ascending order: for each target one within ``CLOSE`` of it, else the nearest that was
        tried. Of steps within ``CLOSE`` of each other, only the first is returned.
    """
    known: dict[int, float] = {}
    found = set()
    for target in targets:
        low, high, middle = 0, steps - 1, 0  # starts at the first step: for many strategies it is above the target
        while low <= high:
            if middle not in known:
                known[middle] = measure(middle)
            if abs(known[middle] - target) <= CLOSE:
                break
            low, high = (middle + 1, high) if known[middle] < target else (low, middle - 1)
            middle = (low + high) // 2
        found.add(min(known, key=lambda step: (abs(known[step] - target), step)))
    chosen: list[int] = []
    for step in sorted(found):
        if not chosen or known[step] - known[chosen[-1]] > CLOSE:
            chosen.append(step)
    return chosen


def needed(points: Sequence[Mapping[str, float]], target: float) -> dict[str, float]:
    """The density that a strategy needs for a recall, linearly interpolated between its settings.

    Args:
        points (Sequence[Mapping[str, float]]): "density", "recall" and "oracle_gap" of each setting.
        target (float): recall to reach.

    Returns:
        dict[str, float]: "target", and "recall", "density" and "oracle_gap" there. The recall is above the target if
        the setting with the smallest density already reaches more; the mapping is empty if no setting reaches it.
    """
    below = None
    for point in sorted(points, key=lambda point: point["density"]):
        if point["recall"] >= target:
            way = 1.0 if below is None else (target - below["recall"]) / (point["recall"] - below["recall"])
            start = below or point
            parts = ("recall", "density", "oracle_gap")
            return {"target": target} | {n: round(start[n] + way * (point[n] - start[n]), DIGITS) for n in parts}
        below = point
    return {}

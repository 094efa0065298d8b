"""The growth of the time for a recall with the length of a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

RECALLS = (0.85, 0.9, 0.925, 0.95, 0.97)


def growth_at_recalls(
    shorter: Mapping[str, Any], longer: Mapping[str, Any], recalls: Sequence[float] = RECALLS
) -> list[dict[str, Any]]:
    """The power of the length with which the time for a recall grows; that of dense attention is 2.

    A row's method is the part of its name before the colon. The time of a method for a recall is linearly interpolated
    between its settings, and so is the oracle's density.

    Args:
        shorter, longer (Mapping[str, Any]): results of :func:`~sparse_prefill.evaluation.timing.mean_comparison` at two
            lengths, given as "tokens", for methods at several settings.
        recalls (Sequence[float]): the recalls.

    Returns:
        list[dict[str, Any]]: a mapping for each recall that some method reached at both lengths: "recall"; "fastest"
        and "seconds", the fastest method and its time at the shorter and the longer length; "power"; "oracle power",
        that of the oracle's blocks at the rate of dense FlexAttention; and "powers" by method, None if its settings
        don't span the recall.

    Raises:
        ValueError: if the two lengths are equal.
    """
    if shorter["tokens"] == longer["tokens"]:
        raise ValueError(f"Growth is between two lengths, got {longer['tokens']} tokens twice.")
    cases = (shorter, longer)
    factor = math.log(longer["tokens"] / shorter["tokens"])
    methods = list(dict.fromkeys(_method(row) for row in longer["strategies"]))
    found = []
    for recall in recalls:
        times = [{method: _time(case, recall, method) for method in methods} for case in cases]
        known = [{method: time for method, time in of_case.items() if time is not None} for of_case in times]
        oracle = [_oracle_seconds(case, recall) for case in cases]
        if not all(known) or None in oracle:
            continue
        fastest = [min(of_case, key=of_case.__getitem__) for of_case in known]
        seconds = [of_case[method] for of_case, method in zip(known, fastest, strict=True)]
        powers = {
            method: math.log(known[1][method] / known[0][method]) / factor
            if method in known[0] and method in known[1]
            else None
            for method in methods
        }
        found.append(
            {
                "recall": recall,
                "fastest": fastest,
                "seconds": seconds,
                "power": math.log(seconds[1] / seconds[0]) / factor,
                "oracle power": math.log(oracle[1] / oracle[0]) / factor,  # type: ignore[operator]
                "powers": powers,
            }
        )
    return found


def _method(row: Mapping[str, Any]) -> str:
    return row["name"].partition(":")[0]


def _time(case: Mapping[str, Any], recall: float, method: str) -> float | None:
    rows = [row for row in case["strategies"] if _method(row) == method]
    return _between(recall, [(row["recall"], row["total"]) for row in rows])


def _oracle_seconds(case: Mapping[str, Any], recall: float) -> float | None:
    needed = _between(recall, [(row["recall"], row["oracle density"]) for row in case["strategies"]])
    return None if needed is None else case["dense flex"] * needed


def _between(at: float, points: Sequence[tuple[float, float]]) -> float | None:
    """Linear interpolation; None outside of the points."""
    for (x, y), (next_x, next_y) in pairwise(sorted(points)):
        if x <= at <= next_x:
            return y if x == next_x else y + (next_y - y) * (at - x) / (next_x - x)
    return None

"""Recall over density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparse_prefill.plotting.line_styles import line_styles

Points = Sequence[tuple[float, float]]


def frontier(points: Mapping[str, Points], oracle: Points = (), title: str = "Recall over density") -> Figure:
    """Recall of strategies over their density, and the oracle as the limit.

    Args:
        points (Mapping[str, Sequence[tuple[float, float]]]): (density, recall) of each setting of a strategy, by the
            strategy's name, in [0, 1]. Settings of one strategy are joined by a line.
        oracle (Sequence[tuple[float, float]]): (density, recall) of the best tables; nothing can be above them.
            Default: none.
        title (str): title of the figure.

    Returns:
        Figure: the picture; a legend names the strategies in the order of their first points' recall.

    Raises:
        ValueError: if there are no points, or one is outside of [0, 1].
    """
    if not any(points.values()):
        raise ValueError("frontier needs at least one strategy with a point.")
    for name, of in (*points.items(), ("oracle", oracle)):
        for point in of:
            if not all(0 <= share <= 1 for share in point):
                raise ValueError(f"Density and recall lie in [0, 1], got {point} of {name}.")
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    if oracle:
        densities, recalls = zip(*sorted(oracle), strict=True)
        limit = list(accumulate(recalls, max))
        axes.plot(densities, limit, color="0.3", linestyle="--", zorder=1)
        axes.fill_between(densities, limit, 1.02, color="0.92", zorder=0)
    handles = [Line2D([], [], color="0.3", linestyle="--", label="oracle")] if oracle else []
    named = sorted(((name, sorted(of)) for name, of in points.items() if of), key=lambda item: -item[1][0][1])
    for (name, of), style in zip(named, line_styles(), strict=False):
        handles += axes.plot(*zip(*of, strict=True), label=name, **style)
    least = min(recall for of in points.values() for _, recall in of)
    axes.set(xlabel="density: kept blocks / visible blocks", ylabel="recall: kept attention", title=title)
    axes.set(xlim=(0, 1.02), ylim=(math.floor(10 * least) / 10 - 0.02, 1.02))
    axes.grid(color="0.9")
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, ncols=1 if len(handles) <= 26 else 2)
    return figure

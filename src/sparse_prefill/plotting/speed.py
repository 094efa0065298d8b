"""Speed-up over the length of the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sparse_prefill.plotting.line_styles import line_styles


def crossover(lengths: Sequence[float], speedups: Sequence[float]) -> float | None:
    """The length from which a strategy stays at least as fast as dense attention.

    Args:
        lengths (Sequence[float]): tokens, ascending.
        speedups (Sequence[float]): dense time over the strategy's time at each length.

    Returns:
        float | None: the length at which the speed-up passes 1 for the last time, interpolated between two lengths on a
        logarithmic scale; the first length if the speed-up is never under 1; None if it is under 1 at the last length.

    Raises:
        ValueError: if there are no lengths, they don't ascend, or a number is missing or not positive.
    """
    _check(lengths, {"speedups": speedups})
    below = [i for i, ratio in enumerate(speedups) if ratio < 1]
    if not below:
        return lengths[0]
    if below[-1] == len(lengths) - 1:
        return None
    a, b = lengths[below[-1]], lengths[below[-1] + 1]
    at_a, at_b = speedups[below[-1]], speedups[below[-1] + 1]
    return a * (b / a) ** ((1 - at_a) / (at_b - at_a))


def speedup(
    lengths: Sequence[float],
    speedups: Mapping[str, Sequence[float]],
    title: str = "Speed-up over dense attention",
) -> Figure:
    """Speed-up over the length of the prompt, with the crossover of each strategy marked.

    Args:
        lengths (Sequence[float]): tokens, ascending.
        speedups (Mapping[str, Sequence[float]]): dense time over a strategy's time at each length, by name.
        title (str): title of the figure.

    Returns:
        Figure: the picture; the legend gives the :func:`crossover` of each strategy.

    Raises:
        ValueError: if there is no strategy, or :func:`crossover` would refuse the lengths or a speed-up.
    """
    if not speedups:
        raise ValueError("speedup needs the numbers of at least one strategy.")
    _check(lengths, speedups)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1, color="0.3", linestyle="--", linewidth=1)
    for (name, ratios), style in zip(speedups.items(), line_styles(), strict=False):
        passes = crossover(lengths, ratios)
        passed = "slower" if passes is None else f"from {passes:,.0f} tokens" if ratios[0] < 1 else "always"
        (line,) = axes.plot(lengths, ratios, markersize=5, label=f"{name} ({passed})", **style)
        if passes is not None and ratios[0] < 1:
            axes.plot([passes], [1], marker="|", markersize=14, markeredgewidth=2, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,.0f}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="tokens", ylabel="times as fast as dense", title=title)
    axes.grid(color="0.9")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _check(lengths: Sequence[float], speedups: Mapping[str, Sequence[float]]) -> None:
    ascending = all(a < b for a, b in pairwise(lengths))
    if not lengths or not ascending or not lengths[0] > 0:
        raise ValueError(f"lengths must be ascending numbers of tokens, got {list(lengths)}.")
    for name, ratios in speedups.items():
        if len(ratios) != len(lengths) or not all(ratio is not None and 0 < ratio < math.inf for ratio in ratios):
            raise ValueError(
                f"{name} must be {len(lengths)} positive numbers, one for each length, got {list(ratios)}."
            )

"""Colours and markers that distinguish many lines."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

from matplotlib import colormaps

MARKERS = "osD^vP*X<>ph"


def line_styles() -> Iterator[dict[str, Any]]:
    """Endless options of ``Axes.plot``; the first sixty all differ."""
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for colour, marker in zip(cycle(colours), cycle(MARKERS), strict=False):
        yield {"color": colour, "marker": marker, "markeredgecolor": "0.2"}

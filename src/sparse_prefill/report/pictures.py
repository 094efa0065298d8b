"""The pictures of an evaluation, as SVG that stands in a page."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A picture, the section that it belongs to, and what it shows."""

    section: str
    caption: str
    svg: str


def pictures_of(results: Mapping[str, Any]) -> list[Picture]:
    """The pictures that there are numbers for.

    Args:
        results (Mapping[str, Any]): see :func:`~sparse_prefill.report.write_report`.

    Returns:
        list[Picture]: frontier, maps of each strategy, grids of needles, speed-up over length.
    """
    import matplotlib

    # Names are no formulas, and text stays text, which a page can search.
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none"}):
        return [*_frontier(results), *_maps(results), *_needles(results), *_speed(results)]


def drawn(figure: Figure, caption: str) -> str:
    """A figure as an ``<svg>`` element that loads nothing; its ids are told apart by the caption."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every figure, and nothing refers to them
    width = f"{figure.get_size_inches()[0] * 96:.0f}px"
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}" style="--width: {width}"', 1)


def _frontier(results: Mapping[str, Any]) -> list[Picture]:
    from sparse_prefill.plotting import frontier

    rows = [row for row in results.get("rows", []) if "density" in row and "recall" in row and row["name"] != "dense"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = row.get("strategy", row["name"])
        points.setdefault(row["name"] if label == "plan" else label, []).append((row["density"], row["recall"]))
    oracle = [(row["oracle_density"], row["recall"]) for row in rows if "oracle_density" in row]
    if not points:
        return []
    caption = "What strategies keep of the attention for what they compute; nothing gets above the oracle's line."
    return [Picture("Frontier", caption, drawn(frontier(points, oracle), caption))]


def _maps(results: Mapping[str, Any]) -> list[Picture]:
    from sparse_prefill.plotting import density_map, recall_map

    found = []
    for row in results.get("rows", []):
        by_head = row.get("by_head", {})
        for key, draw in (("density", density_map), ("recall", recall_map)):
            if row["name"] != "dense" and key in by_head:
                caption = f"{key.capitalize()} of {row['name']} by layer and head."
                figure = draw(torch.tensor(by_head[key]), row["name"])
                found.append(Picture("Layers and heads", caption, drawn(figure, caption)))
    return found


def _needles(results: Mapping[str, Any]) -> list[Picture]:
    from sparse_prefill.plotting import needle_grid

    cells: dict[str, dict[tuple[float, int], list[float]]] = {}
    for one in results.get("tasks", {}).get("results", []):
        if one.get("grid") and one.get("depth") is not None:
            cells.setdefault(one["strategy"], {}).setdefault((one["depth"], one["length"]), []).append(one["exact"])
    found = []
    for strategy, of in cells.items():
        depths, lengths = sorted({depth for depth, _ in of}), sorted({length for _, length in of})
        scores = torch.full((len(depths), len(lengths)), torch.nan)
        for (depth, length), exact in of.items():
            scores[depths.index(depth), lengths.index(length)] = statistics.mean(exact)
        caption = f"Answers that {strategy} finds inside the prefill, by length of the prompt and depth in it."
        found.append(Picture("Needles", caption, drawn(needle_grid(scores, depths, lengths, strategy), caption)))
    return found


def _speed(results: Mapping[str, Any]) -> list[Picture]:
    from sparse_prefill.plotting import speedup

    of = {name: row["speedup"] for name, row in results.get("strategies", {}).items() if "speedup" in row}
    if not of:
        return []
    caption = "Dense attention's time over that of each strategy, and the length from which on it is faster."
    return [Picture("Speed", caption, drawn(speedup(results["lengths"], of), caption))]

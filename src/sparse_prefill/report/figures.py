"""The pictures of an evaluation."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A figure with its kind, the row that it shows ("" for all rows) and its caption."""

    kind: str
    row: str
    caption: str
    figure: Figure


def figures_of(results: Mapping[str, Any]) -> list[Picture]:
    """All pictures for which the results have numbers. Needs the ``plot`` extra.

    Args:
        results (Mapping[str, Any]): see :func:`~sparse_prefill.report.write_report`.

    Returns:
        list[Picture]: of the kinds "frontier", "needles" (a grid for each strategy), "speedup", and "density" and
        "recall" (maps of each strategy).
    """
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name is no formula
        return [*_frontier(results), *_needles(results), *_speedup(results), *_maps(results)]


def speedups_of(results: Mapping[str, Any]) -> dict[str, list[float]]:
    """Speed-up of each strategy at each of the "lengths", as benchmarks/crossover.py writes it; empty without it."""
    of = results.get("strategies")
    return (
        {name: row["speedup"] for name, row in of.items()} if isinstance(of, Mapping) and "lengths" in results else {}
    )


def svg(figure: Figure, caption: str) -> str:
    """A figure as a self-contained ``<svg>`` element; the caption makes its ids unique."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):  # text stays text
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # equal in every figure, and unused
    width = f"{figure.get_size_inches()[0] * 96:.0f}px"
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}" style="--width: {width}"', 1)


def _frontier(results: Mapping[str, Any]) -> Iterator[Picture]:
    from sparse_prefill.plotting import frontier

    rows = [row for row in results.get("rows", []) if "density" in row and "recall" in row and row["name"] != "dense"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = row.get("strategy", row["name"])
        points.setdefault(row["name"] if label == "plan" else label, []).append((row["density"], row["recall"]))
    oracle = [(row["oracle_density"], row["recall"]) for row in rows if "oracle_density" in row]
    if limit := results.get("oracle"):  # of all layers together, which is above that of single layers
        oracle = list(zip(limit["density"], limit["recall"], strict=True))
    if points:
        caption = (
            "Recall of strategies over their density. The oracle's line is the limit, in the query blocks in which "
            "recall was measured."
        )
        tokens = results.get("tokens")
        title = str(results.get("model", "")) + (f", {tokens:,} tokens" if isinstance(tokens, int) else "")
        yield Picture("frontier", "", caption, frontier(points, oracle, title))


def _needles(results: Mapping[str, Any]) -> Iterator[Picture]:
    from sparse_prefill.plotting import needle_grid

    cells: dict[str, dict[tuple[float, int], list[float]]] = {}
    for one in results.get("tasks", {}).get("results", []):
        if one.get("grid"):
            cells.setdefault(one["strategy"], {}).setdefault((one["depth"], one["length"]), []).append(one["exact"])
    for name, of in cells.items():
        depths, lengths = sorted({depth for depth, _ in of}), sorted({length for _, length in of})
        scores = torch.full((len(depths), len(lengths)), torch.nan)
        for (depth, length), exact in of.items():
            scores[depths.index(depth), lengths.index(length)] = statistics.mean(exact)
        caption = f"Share of the answers that {name} finds inside the prefill, by length of the prompt and depth."
        yield Picture("needles", name, caption, needle_grid(scores, depths, lengths, name))


def _speedup(results: Mapping[str, Any]) -> Iterator[Picture]:
    from sparse_prefill.plotting import speedup

    if of := speedups_of(results):
        caption = "Time of dense attention over that of each strategy, and the length from which it is faster."
        yield Picture("speedup", "", caption, speedup(results["lengths"], of))


def _maps(results: Mapping[str, Any]) -> Iterator[Picture]:
    from sparse_prefill.plotting import density_map, recall_map

    for row in results.get("rows", []):
        by_head = row.get("by_head", {})
        for kind, draw in (("density", density_map), ("recall", recall_map)):
            if row["name"] != "dense" and kind in by_head:
                caption = f"{kind.capitalize()} of {row['name']} by layer and head."
                yield Picture(kind, row["name"], caption, draw(torch.tensor(by_head[kind]), row["name"]))

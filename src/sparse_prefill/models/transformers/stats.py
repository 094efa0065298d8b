"""Statistics of prefill in each layer of a model, as a table and as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.record import Call

COLUMNS = ("layer", "strategy", "calls", "dense", "density", "heads", "seconds")


@dataclass(eq=False)
class LayerStats:
    """The prefill calls of one layer.

    Args:
        heads (int): query heads of the layer.
        calls (list[Call]): its calls in order. A forward adds one call for each prompt: one in all, or one for each row
            of a padded batch and for each packed document.
    """

    heads: int
    calls: list[Call] = field(default_factory=list)

    @property
    def density(self) -> Tensor:
        """Share of the visible blocks that each head computed, fp32 [heads]; calls weigh by their token pairs."""
        total, weights = torch.zeros(self.heads), 0
        for call in self.calls:
            pairs = call.q_len * (2 * call.kv_len - call.q_len + 1) // 2
            total += pairs * call.density.mean(0).expand(self.heads)
            weights += pairs
        return total / max(weights, 1)

    @property
    def dense(self) -> dict[str, int]:
        """The number of dense calls, by reason."""
        return dict(Counter(call.dense for call in self.calls if call.dense is not None))

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of "estimate", "select", "table" and "kernel"."""
        total: Counter[str] = Counter()
        for call in self.calls:
            total.update(call.seconds)
        return dict(total)

    @property
    def strategy(self) -> str:
        """Labels of the strategies, separated by commas."""
        return ", ".join(dict.fromkeys(call.strategy for call in self.calls))


class Stats:
    """Statistics of prefill in each layer and head of a model. ``print`` shows a table.

    Attributes:
        layers (dict[int, LayerStats]): layers that attended to a prompt so far, by index. Their calls don't include
            decoding steps.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerStats] = {}

    def add(self, layer: int, heads: int, calls: Sequence[Call]) -> None:
        """Add the calls of one forward of a layer."""
        self.layers.setdefault(layer, LayerStats(heads)).calls.extend(calls)

    @property
    def density(self) -> float:
        """Mean density of all layers and heads; 1 if nothing ran."""
        layers = list(self.layers.values())
        return float(torch.cat([layer.density for layer in layers]).mean()) if layers else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The statistics as plain numbers, strings, lists and dicts."""
        layers = [
            {
                "layer": index,
                "strategy": layer.strategy,
                "calls": len(layer.calls),
                "dense": layer.dense,
                "density": layer.density.tolist(),
                "seconds": layer.seconds,
            }
            for index, layer in sorted(self.layers.items())
        ]
        return {"density": self.density, "layers": layers}

    def __str__(self) -> str:
        rows = [COLUMNS, *(_row(index, layer) for index, layer in sorted(self.layers.items()))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"mean density {self.density:.1%}"])


def _row(index: int, layer: LayerStats) -> tuple[str, ...]:
    density = layer.density
    dense = ", ".join(f"{count} {reason}" for reason, count in layer.dense.items())
    return (
        str(index),
        layer.strategy,
        str(len(layer.calls)),
        dense or "-",
        f"{density.mean():.1%}",
        f"{density.min():.1%} to {density.max():.1%}",
        f"{sum(layer.seconds.values()):.3f}",
    )

"""Layers that ran dense and sliding windows, from rows of results as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def ran_dense(row: Mapping[str, Any]) -> str | None:
    """Number of dense layers by reason, "2 min_length, 1 strategy"; None without any, and for "dense" itself."""
    layers = row.get("dense_layers") or {}
    if row.get("strategy") == "dense" or not layers:
        return None
    return ", ".join(f"{len(found)} {reason}" for reason, found in layers.items())


def sliding_windows(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """A sentence on the sliding windows of the model, from the first row that has some; None without any."""
    windows: Mapping[str, Sequence[int]] = next((row["windows"] for row in rows if row.get("windows")), {})
    if not windows:
        return None
    found = "; ".join(f"{tokens} tokens in layers {ranges(layers)}" for tokens, layers in windows.items())
    return (
        f"Sliding windows: {found}. Those under a strategy's min_length run dense, as in use, and count as such in all "
        "numbers."
    )


def ranges(layers: Sequence[int]) -> str:
    """Ascending numbers of layers, successive ones as a range: "0-4, 6"."""
    found: list[list[int]] = []
    for layer in layers:
        if found and found[-1][-1] == layer - 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return ", ".join(str(one[0]) if len(one) == 1 else f"{one[0]}-{one[-1]}" for one in found)

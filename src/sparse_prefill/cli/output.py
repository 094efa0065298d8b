"""What commands print on stdout: text for people, or JSON for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option ``--json``, the same for each command."""
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout, and nothing else")


def print_json(content: Any) -> None:
    """Print JSON; objects that it has no form for are printed as their names."""
    print(json.dumps(content, indent=1, default=str))


def print_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print rows below each other, a column for each key that any of them has.

    Args:
        rows (Sequence[Mapping[str, Any]]): values by key.
        columns (Mapping[str, str]): format of each key's values, as ``"{:.3f}"``.
    """
    shown = [key for key in columns if any(row.get(key) is not None for row in rows)]
    cells = [[key.replace("_", " ") for key in shown]]
    for row in rows:
        cells.append(["" if row.get(key) is None else columns[key].format(row[key]) for key in shown])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *others = line
        padded = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"{first:{widths[0]}}", *padded]).rstrip())

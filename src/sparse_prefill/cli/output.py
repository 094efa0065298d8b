"""Output of commands on stdout: tables for people, or JSON for programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option ``--json``, which all commands share."""
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout, and nothing else")


def print_json(content: Any) -> None:
    """Print JSON; values that JSON can't hold are printed as ``str`` gives them."""
    print(json.dumps(content, indent=1, default=str))


def print_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> None:
    """Print a table with a column for each key that any row has; text is left-aligned, numbers right-aligned.

    Args:
        rows (Sequence[Mapping[str, Any]]): values by key.
        columns (Mapping[str, tuple[str, str]]): heading and number format of each key's column, e.g.
            ``("recall", "{:.3f}")``.
    """
    shown = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
    if not shown:
        return
    cells = [[heading for heading, _ in shown.values()]]
    for row in rows:
        cells.append(["" if row.get(key) is None else form.format(row[key]) for key, (_, form) in shown.items()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = ["<" if any(isinstance(row.get(key), str) for row in rows) else ">" for key in shown]
    for line in cells:
        padded = [f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)]
        print("  ".join(padded).rstrip())


@contextmanager
def shown_from(path: Path) -> Iterator[None]:
    """A context for code that shows a report: errors from wrong or edited parts of the file become a ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        reason = f"{path} can't be shown as a report ({type(error).__name__}: {error})"
        raise ValueError(f"{reason}: give a file that `sparse-prefill eval` wrote.") from error

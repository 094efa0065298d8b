"""Result files: JSON with one record a line, without what no page, picture or test reads."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MAPPED = "flex_prefill"  # the strategy whose maps of layers and heads are drawn
UNREAD = {
    "by_prompt",
    "density by kind",
    "exponents",
    "host",
    "overhead share",
    "perplexity_ratio_whole",
    "recall by kind",
    "rest",
    "short",
    "work",
}
OF_SETTINGS = {"options", "overlap", "worst_recall"}  # in a frontier, whose rows are the points of a picture


def command(script: str, argv: Sequence[str] | None) -> str:
    """The command of a report; folders of this machine, which say nothing on another one, are left out."""
    words = sys.argv[1:] if argv is None else argv
    told = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *told])


def write(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write a report, and the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(report) + "\n")


def lines(value: Any, indent: str = "") -> str:
    """JSON that is broken into lines down to the records, each of which is one line."""
    if indent and not _holds_records(value):
        return json.dumps(value)
    deeper = indent + " "
    if isinstance(value, Mapping):
        parts = [f"{json.dumps(key)}: {lines(part, deeper)}" for key, part in value.items()]
        left, right = "{}"
    else:
        parts = [lines(part, deeper) for part in value]
        left, right = "[]"
    return f"{left}\n" + ",\n".join(deeper + part for part in parts) + f"\n{indent}{right}"


def _holds_records(value: Any) -> bool:
    if not isinstance(value, list | Mapping) or not value:
        return False
    parts = list(value.values()) if isinstance(value, Mapping) else value
    return all(isinstance(part, Mapping) for part in parts) or any(map(_holds_records, parts))


def slimmed(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what nothing reads."""
    unread = UNREAD | (OF_SETTINGS if "densities" in report else set())
    return {key: _slim(part, unread) for key, part in report.items() if key not in unread and not _is_repr(part)}


def _slim(value: Any, unread: set[str]) -> Any:
    if isinstance(value, list):
        # Of the samples of tasks only those on a grid are drawn; the summary has the others.
        return [_slim(part, unread) for part in value if not isinstance(part, Mapping) or part.get("grid", True)]
    if not isinstance(value, Mapping):
        return value
    maps = set() if value.get("name") == MAPPED else {"by_head"}
    return {key: _slim(part, unread) for key, part in value.items() if key not in unread | maps and not _is_repr(part)}


def _is_repr(value: Any) -> bool:
    """Whether a strategy is written out with all its options, which its name says shorter."""
    return isinstance(value, str) and "(block_size=" in value

"""Tables, numbers and verdicts of the pages, from the result files.

A table is declared in tables.yaml and shown in a page between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. A
number in a sentence is followed by its file and key in a comment, which readers of the page don't see:
``5.23<!--demo_qwen2_5_coder_16k:speedup/attention--> times``. So is the verdict on a goal:
``met<!--demo_qwen2_5_coder_16k:speedup/attention at least 3-->``. pages.py writes all of them again from the files.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TABLES: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "tables.yaml").read_text())
NUMBER = re.compile(r"(?P<shown>\d[\d,]*(?:\.\d+)?)<!--(?P<file>\w+):(?P<key>[^>]+?)(?: \* (?P<factor>\d+))?-->")
VERDICT = re.compile(
    r"(?:met|missed)(?P<from><!--(?P<file>\w+):(?P<key>[^>]+?) at (?P<limit>least|most) (?P<goal>[\d.]+)-->)"
)

Record = dict[str, Any]


# Numbers in sentences


def with_numbers(text: str) -> str:
    """The text with its numbers and verdicts as the files have them; numbers keep their number of digits."""
    return VERDICT.sub(_verdict, NUMBER.sub(_number, text))


def _number(match: re.Match) -> str:
    value = float(found(match["file"], match["key"])) * int(match["factor"] or 1)
    digits = len(match["shown"].partition(".")[2])
    return f"{value:,.{digits}f}{match[0][len(match['shown']) :]}"


def _verdict(match: re.Match) -> str:
    value, goal = found(match["file"], match["key"]), float(match["goal"])
    met = value >= goal if match["limit"] == "least" else value <= goal
    return ("met" if met else "missed") + match["from"]


def found(file: str, key: str) -> Any:
    """The value in a result file at a path such as ``rows/flex_prefill/density``.

    Args:
        file (str): name without ".json".
        key (str): parts between slashes. A part is a key, the name of a record in a list, ``tokens=8000`` for the
            record with this value, or a place in a list.

    Raises:
        ValueError: if there is no such file or value.
    """
    path = RESULTS / f"{file}.json"
    if not path.exists():
        raise ValueError(f"There is no result file {path.name}.")
    value = json.loads(path.read_text())
    for part in re.split(r"(?<! )/(?! )", key):
        value = value.get(part) if isinstance(value, Mapping) else _record(value, part)
        if value is None:
            raise ValueError(f"{path.name} has no {part!r} of {key!r}.")
    return value


def _record(records: Sequence, part: str) -> Any:
    for one in records:
        if isinstance(one, Mapping) and one.get("name") == part:
            return one
    name, _, value = part.partition("=")
    for one in records:
        if isinstance(one, Mapping) and value and str(one.get(name)) == value:
            return one
    return records[int(part)] if part.isdigit() and int(part) < len(records) else None


# Tables


def table(
    spec: Mapping[str, Any], keep: Callable[[Record], bool] = lambda record: True, label: Callable = lambda row: ""
) -> str:
    """A declared table as Markdown, with a caption that names the model, the machine and the file.

    Args:
        spec (Mapping[str, Any]): an entry of tables.yaml:

            * "files", a glob in benchmarks/results;
            * "rows", the path to the records, through lists and mappings; a record also holds the values above it;
            * "columns", a format of a record for each heading;
            * "where", values that a record must have;
            * "only", the names of the records to show, in this order;
            * "across", a format: records with the same first cell share a row, with columns for each of its values;
            * "before", a sentence above the table.

        keep (Callable[[Record], bool]): whether a record is shown. Default: all are.
        label (Callable): the text of ``{label}`` for a record.
    """
    by_file = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{spec['files']}.json"))}
    records = []
    for report in by_file.values():
        for record in _records(report, spec["rows"].split("/"), {}):
            if keep(record) and all(record.get(key) == value for key, value in spec.get("where", {}).items()):
                records.append(record | {"label": label(record)})
    if only := spec.get("only"):
        records = [record for name in only for record in records if record["name"] == name]
    shown = _across(spec, records) if "across" in spec else _plain(spec, records)
    captions = "\n\n".join(caption(report, path.name) for path, report in by_file.items())
    return "\n\n".join([*([spec["before"]] if "before" in spec else []), markdown(shown), captions])


def _records(value: Any, path: Sequence[str], above: Record) -> Iterator[Record]:
    if isinstance(value, list):
        for one in value:
            yield from _records(one, path, above)
        return
    own = above | {key: one for key, one in value.items() if not path or key != path[0]}
    if not path:
        yield own
    elif path[0] == "*":
        for name, one in value.items():
            yield from _records(one, path[1:], above | {"name": name})
    elif path[0] in value:
        yield from _records(value[path[0]], path[1:], own)


def _plain(spec: Mapping[str, Any], records: Sequence[Record]) -> list[list[str]]:
    columns = {head: [cell(form, record) for record in records] for head, form in spec["columns"].items()}
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    rows = zip(*columns.values(), strict=True)
    return [list(columns), *(list(row) for row in rows if any(row[1:]))]  # no rows with only a name


def _across(spec: Mapping[str, Any], records: Sequence[Record]) -> list[list[str]]:
    (first, name), *others = spec["columns"].items()
    groups = list(dict.fromkeys(cell(spec["across"], record) for record in records))
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        rows.setdefault(cell(name, record), {})[cell(spec["across"], record)] = record
    heads = [f"{group}: {head}" if len(others) > 1 else group for group in groups for head, _ in others]
    body = [[row, *(cell(form, of.get(g, {})) for g in groups for _, form in others)] for row, of in rows.items()]
    return [[first, *heads], *body]


class _Cells(string.Formatter):
    """``str.format`` with three additions: "ms" before a format shows seconds as milliseconds, "?" before a text shows
    it where the value is true, and None is "-".
    """

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return "-"
        if format_spec.startswith("?"):
            return format_spec[1:] if value else ""
        if format_spec.startswith("ms"):
            value, format_spec = value * 1e3, format_spec[2:]
        return super().format_field(value, format_spec)


def cell(form: str, record: Record) -> str:
    """One cell; empty where the record lacks the value."""
    try:
        return _Cells().vformat(form, (), record).replace("|", "/")
    except (KeyError, TypeError):
        return ""


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def caption(report: Mapping[str, Any], file: str) -> str:
    """Model, text, machine and date of a report, and its file, which also holds the command."""
    on = f" on {report['text']}" if report.get("text") else ""
    parts = [f"{report['model']}{on}"] if report.get("model") else []
    parts += [f"{report['tokens']:,} tokens"] if report.get("tokens") else []
    parts += [str(report[key]) for key in ("dtype", "device") if report.get(key)]
    threads = report.get("threads")
    parts += [f"{threads} thread{'s' if threads > 1 else ''}"] if threads else []
    parts += [f"torch {report['torch']}"] if report.get("torch") else []
    parts += [str(report["date"])[:10]] if report.get("date") else []
    parts += [f"`{report['strategy']}`"] if report.get("strategy") else []
    times = report.get("times")
    if times:
        parts += [f"times {times['date'][:10]} on {times['threads']} threads"]
    return f"*{', '.join(parts)}; `benchmarks/results/{file}`*"

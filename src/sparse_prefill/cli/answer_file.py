"""A JSON-lines file of answers that an interrupted run goes on with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_prefill.core.files import parse_json

LINE_START = b'{"id": '


@dataclass(frozen=True)
class Answer:
    """A line of the output, as it stands there."""

    digest: str
    line: str


def read_objects(path: Path, text: str) -> list[tuple[str, int, dict[str, Any], str]]:
    """The JSON objects of a file's lines: where each stands, for messages, its number from 1 on, it, and its line."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                entry = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{where} is no JSON: {error}") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{where} must be an object, got {line[:40]!r}.")
            found.append((where, number, entry, line))
    return found


def answered(output: Path) -> dict[str | int, Answer]:
    """What the output answers, by id. What a crash left of a line at its end is left out."""
    if not output.exists():
        return {}
    whole, newline, tail = output.read_bytes().rpartition(b"\n")
    tail = tail.strip(b"\0")  # which some file systems fill up with
    try:
        read_objects(output, tail.decode())
        whole, tail = whole + newline + tail, b""  # nothing but the end of its line is missing
    except ValueError:
        if not tail.startswith(LINE_START[: len(tail)]):
            raise ValueError(f"{output} ends with what is no answer: name another output.") from None
    try:
        text = whole.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{output} isn't text in UTF-8 (byte {error.start}): name another output.") from None
    found: dict[str | int, Answer] = {}
    for where, _, entry, line in read_objects(output, text):
        known = {"id", "answer", "digest"} <= entry.keys() and isinstance(entry["id"], (str, int))
        if not known or entry["id"] in found:
            raise ValueError(f"{where} is no answer, or the second one to its prompt: name another output.")
        found[entry["id"]] = Answer(entry["digest"], line)
    return found


def keep_lines(output: Path, lines: list[str]) -> None:
    """Leave these lines of the output; an interruption leaves the file as it was or as it should be."""
    content = "".join(f"{line}\n" for line in lines)
    if output.exists() and output.read_bytes() != content.encode():
        beside = output.with_name(f"{output.name}.part")
        beside.write_text(content, encoding="utf-8")
        os.replace(beside, output)

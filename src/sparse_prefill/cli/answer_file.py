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
    """A line of the file, unchanged, and the digest in it."""

    digest: str
    line: str


def read_objects(path: Path, text: str) -> list[tuple[str, int, dict[str, Any], str]]:
    """The JSON objects in a file's lines: place for messages, line number from 1, object, and line."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                entry = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{where} isn't JSON: {error}") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{where} must be an object, got {line[:40]!r}.")
            found.append((where, number, entry, line))
    return found


def answered(output: Path) -> dict[str | int, Answer]:
    """The answers in a file, by id, without a last line that a crash cut off."""
    if not output.exists():
        return {}
    whole, newline, tail = output.read_bytes().rpartition(b"\n")
    tail = tail.strip(b"\0")  # zeros, which some file systems append after a crash
    try:
        read_objects(output, tail.decode())
        whole, tail = whole + newline + tail, b""  # only the end of the line is missing
    except ValueError:
        if not tail.startswith(LINE_START[: len(tail)]):
            raise ValueError(f"{output} ends with something that isn't an answer: name another output.") from None
    try:
        text = whole.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{output} isn't text in UTF-8 (byte {error.start}): name another output.") from None
    found: dict[str | int, Answer] = {}
    for where, _, entry, line in read_objects(output, text):
        known = {"id", "answer", "digest"} <= entry.keys() and isinstance(entry["id"], (str, int))
        if not known or entry["id"] in found:
            raise ValueError(f"{where} isn't an answer, or is a second one to the same prompt: name another output.")
        found[entry["id"]] = Answer(entry["digest"], line)
    return found


def keep_lines(output: Path, lines: list[str]) -> None:
    """Reduce the file to these lines; an interruption leaves the old file or the new one."""
    content = "".join(f"{line}\n" for line in lines)
    if output.exists() and output.read_bytes() != content.encode():
        beside = output.with_name(f"{output.name}.part")
        beside.write_text(content, encoding="utf-8")
        os.replace(beside, output)

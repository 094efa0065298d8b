"""Texts that tasks hide things in: prose, noise and words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from sparse_prefill.core.files import read_text

Haystack = str | Path | Sequence[str | Path] | None

NOISE = (
    "A lamp stands on the table. Rain falls on the roof. The kettle is warm. Somewhere a clock ticks. Nobody speaks."
)
MAX_WORDS = 60  # of a sentence; tables and grammars in a text have no full stops


def sentences(haystack: Haystack) -> Sequence[str]:
    """The sentences of text files, or of the language reference that comes with Python.

    Args:
        haystack (str | Path | Sequence[str | Path] | None): one text file or several. Default: None, the reference.

    Returns:
        Sequence[str]: sentences without line breaks; long ones are cut.

    Raises:
        ValueError: if a file can't be read or there are no words in it.
    """
    if haystack is None:
        return _reference()
    return _files((haystack,) if isinstance(haystack, (str, Path)) else tuple(haystack))


@cache
def _reference() -> tuple[str, ...]:
    from pydoc_data import topics

    return _split("\n".join(map(str, topics.topics.values())))


@cache
def _files(paths: tuple[str | Path, ...]) -> tuple[str, ...]:
    try:
        text = "\n".join(read_text(path, "haystack") for path in paths)
    except ValueError as error:
        raise ValueError(f"The haystack must be UTF-8 text files: {error}") from error
    if not text.split():
        raise ValueError(f"The haystack {', '.join(map(str, paths))} has no words in it.")
    return _split(text)


def _split(text: str) -> tuple[str, ...]:
    found: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        words = sentence.split()
        found += [" ".join(words[i : i + MAX_WORDS]) for i in range(0, len(words), MAX_WORDS)]
    return tuple(found)


@cache
def words(kind: str) -> tuple[str, ...]:
    """Lower-case English words of one kind, sorted, without swear words. Needs the ``tasks`` extra.

    Args:
        kind (str): "noun", "adjective" or "verb".
    """
    from wonderwords import RandomWord, is_profanity

    found = RandomWord().filter(include_categories=[kind])
    return tuple(sorted(w for w in found if w.isascii() and w.isalpha() and w.islower() and not is_profanity(w)))

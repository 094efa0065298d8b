"""Patterns of single heads, and the JSON files in which MInference publishes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_prefill.core.files import read_json, with_numbers
from sparse_prefill.core.option_checks import check_tokens

TYPES = ("vertical_and_slash", "stream_llm", "block_sparse")


class HeadPattern(NamedTuple):
    """What one head keeps.

    Args:
        type (str): "vertical_and_slash", "stream_llm" or "block_sparse".
        vertical (int | None): tokens of key columns; first tokens of "stream_llm"; key blocks of 64 tokens that each
            query block keeps of "block_sparse".
        slash (int | None): tokens of diagonals; nearest tokens of "stream_llm"; not used of "block_sparse".
        score (float): how well it did when it was chosen; kept for the file. Default: 1.
    """

    type: str
    vertical: int | None
    slash: int | None
    score: float = 1


def load_patterns(path: str | Path) -> list[dict[int, HeadPattern]]:
    """Read a pattern file of the published format: the listed heads of each layer.

    Args:
        path (str | Path): JSON file: a list over layers of mappings from head numbers to ``[type, size, size, score]``.

    Returns:
        list[dict[int, HeadPattern]]: patterns by query head, for each layer.

    Raises:
        ValueError: if the file holds anything else.

    Example:
        >>> load_patterns("patterns.json")[0][3]
        HeadPattern(type='vertical_and_slash', vertical=1000, slash=6096, score=0.98)
    """
    layers = read_json(path, "pattern file")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError(f"{path} must hold a list over layers of mappings from heads to patterns.")
    for layer in layers:
        named = [head for head in layer if not head.isdecimal()]
        if named:
            raise ValueError(f"{path} must number its heads from 0, got {named[0]!r}.")
    return [check_patterns(f"{path}, layer {i}", with_numbers(layer)) for i, layer in enumerate(layers)]


def save_patterns(path: str | Path, layers: Sequence[Mapping[int, Sequence[Any]]]) -> None:
    """Write a pattern file of the published format; :func:`load_patterns` undoes it.

    Args:
        path (str | Path): file to write.
        layers (Sequence[Mapping[int, Sequence]]): for each layer the patterns of its listed query heads, each a
            :class:`HeadPattern` or its fields in order.

    Raises:
        ValueError: if a head or its pattern is none.
    """
    content = [check_patterns(f"layer {index}", heads) for index, heads in enumerate(layers)]
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def check_patterns(where: str, heads: Mapping[int, Sequence[Any]]) -> dict[int, HeadPattern]:
    """Patterns by head, with each entry as a :class:`HeadPattern`; ValueError, which begins with ``where``, if none."""
    if not isinstance(heads, Mapping):
        raise ValueError(f"{where} must be a mapping from heads to patterns, got {heads!r}.")
    out = {}
    for head, value in heads.items():
        if isinstance(head, bool) or not isinstance(head, int) or head < 0:
            raise ValueError(f"{where}: heads must be numbered from 0, got {head!r}.")
        if not isinstance(value, (list, tuple)) or len(value) not in (3, 4):
            raise ValueError(f"{where}: head {head} must have [type, size, size, score], got {value!r}.")
        pattern = HeadPattern(*value)
        check_type(f"{where}: the type of head {head}", pattern.type)
        for size in pattern[1:3]:
            check_tokens(f"{where}: a size of head {head}", size)
        if isinstance(pattern.score, bool) or not isinstance(pattern.score, (int, float)):
            raise ValueError(f"{where}: the score of head {head} must be a number, got {pattern.score!r}.")
        out[head] = pattern
    return out


def check_type(name: str, value: str) -> None:
    """Raise ValueError unless ``value`` is the type of a pattern."""
    if value not in TYPES:
        raise ValueError(f"{name} must be one of {', '.join(TYPES)}, got {value!r}.")

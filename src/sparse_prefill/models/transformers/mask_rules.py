"""Finds the rule of a transformers mask function, by its code and the values that it captures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
)


def split_packing(mask_function: Callable) -> tuple[Callable, Tensor | None]:
    """A mask function without the rule that separates packed sequences, and the sequence number of each token."""
    parts = _captured(mask_function).get("mask_functions", ())
    none = torch.empty(0)
    separate = packed_sequence_mask_function(none)
    remapped = remap_positions_for_packed_sequence(causal_mask_function, none)
    if _code(mask_function) == _code(and_masks()) and list(map(_code, parts)) == [_code(separate), _code(remapped)]:
        return _captured(parts[1])["mask_function"], _captured(parts[0])["packed_sequence_mask"]
    return mask_function, None


def chunk_starts(rule: Callable, size: int) -> Tensor | None:
    """Where the first chunk of each row begins [B], if a mask function is that of chunks of this size."""
    parts = _captured(rule).get("mask_functions", ())
    starts = _captured(parts[0]).get("left_padding") if parts else None
    return starts if starts is not None and is_same_rule(rule, chunked_causal_mask_function(size, starts)) else None


def is_same_rule(a: Any, b: Any) -> bool:
    """Whether two mask functions have the same code and capture the same values."""
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        return _code(a) == _code(b) and is_same_rule(tuple(_captured(a).values()), tuple(_captured(b).values()))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(is_same_rule, a, b))
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)


def rule_names(rule: Any) -> Iterator[str]:
    """transformers' names of the functions that a mask function combines."""
    inner = [part for value in _captured(rule).values() for part in (value if isinstance(value, tuple) else (value,))]
    functions = [part for part in inner if isinstance(part, FunctionType)]
    if not functions:
        yield getattr(rule, "__qualname__", type(rule).__name__).partition(".")[0]
    for function in functions:
        yield from rule_names(function)


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


def _captured(function: Any) -> Mapping[str, Any]:
    return inspect.getclosurevars(function).nonlocals if isinstance(function, FunctionType) else {}

"""Checks of the options that strategies, estimators and selectors share."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

MAX_TOKENS = 2**31 - 1  # positions are int32 in the kernels


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a number in (0, 1]."""
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}.")


def check_finite(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number."""
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")


def check_nonnegative(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a finite number, 0 or more."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number, 0 or more, got {value!r}.")


def check_tokens(name: str, value: int | None, *, least: int = 0) -> None:
    """Raise ValueError unless ``value`` is a whole number of tokens, from ``least`` to 2**31 - 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}.")
    if value > MAX_TOKENS:
        raise ValueError(f"{name} must be a whole number, {MAX_TOKENS} at most, got {value!r}.")


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless ``block_size`` is a power of two, at least 16 and less than 2**31."""
    whole = isinstance(block_size, int) and not isinstance(block_size, bool)
    if not whole or block_size < 16 or block_size & (block_size - 1):
        raise ValueError(
            f"block_size must be a power of two, at least 16, got {block_size!r}: 128 is fast everywhere, 64 selects "
            "more finely."
        )
    check_tokens("block_size", block_size)


def as_int(value: Any) -> Any:
    """A whole number of another library, such as numpy's, as an int; anything else unchanged."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _is_number(value: object) -> bool:
    """Whether torch takes it as a number: a float, including infinity, or a whole number of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return not math.isnan(value) if isinstance(value, float) else abs(value) < 2**63

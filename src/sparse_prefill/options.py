"""Checks of the options that strategies, estimators and selectors share."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any


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
    """Raise ValueError unless ``value`` is a whole number of tokens, ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}.")


def as_int(value: Any) -> Any:
    """A whole number of another library, such as numpy's, as an int; anything else as it is."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)

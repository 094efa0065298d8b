"""Copies of frozen values."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

T = TypeVar("T")


def copy_with(value: T, **attributes: Any) -> T:
    """A shallow copy of a frozen value with other values of attributes that its constructor doesn't take.

    ``dataclasses.replace`` would build the value from its fields again: checks would run twice, and caches would be
    lost. The given value doesn't change.
    """
    made = copy.copy(value)
    vars(made).update(attributes)
    return made

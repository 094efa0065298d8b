"""A class attribute that depends on the options of the instance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ByOptions(Generic[T]):
    """The class has the value at default options, an instance the value at its own.

    Args:
        default (T): value at the defaults, which the class gives.
        of (Callable[[Any], T]): value of an instance.

    Example:
        >>> class Top:
        ...     k = 1
        ...     is_single = ByOptions(True, lambda self: self.k == 1)
        >>> Top.is_single
        True
    """

    def __init__(self, default: T, of: Callable[[Any], T]) -> None:
        self.default = default
        self.of = of

    def __get__(self, instance: object, owner: type) -> T:
        return self.default if instance is None else self.of(instance)

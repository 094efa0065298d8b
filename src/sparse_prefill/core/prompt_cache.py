"""What is computed once for a prompt and used by all layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import torch

T = TypeVar("T")
Options = ParamSpec("Options")


class CacheKey(NamedTuple):
    """What tells one value in a prompt's cache from the others.

    Args:
        name (str): name of the value.
        device (torch.device): where it is.
        options (tuple[Hashable, ...]): what else it depends on. Default: nothing.
    """

    name: str
    device: torch.device
    options: tuple[Hashable, ...] = ()


class PromptCache:
    """Values that depend on a prompt, such as its block tables, and not on queries and keys.

    One prompt passes through all layers of a model, so that each table is computed once. Wrappers that reuse a table in
    later layers put it here, too.
    """

    def __init__(self) -> None:
        self._values: dict[CacheKey, Any] = {}

    def __len__(self) -> int:
        """Number of values."""
        return len(self._values)

    def get(self, key: CacheKey, make: Callable[[], T]) -> T:
        """The value of a key; the first call makes it."""
        if key not in self._values:
            self._values[key] = make()
        return self._values[key]

    def put(self, key: CacheKey, value: object) -> None:
        """Set the value of a key, in place of an earlier one."""
        self._values[key] = value

    def find(self, key: CacheKey) -> Any:
        """The value of a key, or None if there is none."""
        return self._values.get(key)


class HasCache(Protocol):
    """What :func:`cached` needs of a function's first argument."""

    @property
    def cache(self) -> PromptCache: ...


Shape = TypeVar("Shape", bound=HasCache)


def cached(
    compute: Callable[Concatenate[Shape, torch.device, Options], T],
) -> Callable[Concatenate[Shape, torch.device | str, Options], T]:
    """Keep the results of a function in the cache of its first argument, one for each device and set of options."""
    name = f"{compute.__module__}.{compute.__qualname__}"

    @wraps(compute)
    def run(shape: Shape, device: torch.device | str, *args: Options.args, **kwargs: Options.kwargs) -> T:
        device = torch.device(device)
        key = CacheKey(name, device, (*args, *sorted(kwargs.items())))
        return shape.cache.get(key, lambda: compute(shape, device, *args, **kwargs))

    return run

"""Strategies as plain values for files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparse_prefill import registry
from sparse_prefill.strategy.base import Strategy


def to_config(strategy: Strategy) -> dict[str, Any]:
    """The name and the options of a strategy as numbers, strings, lists and dicts.

    :func:`~sparse_prefill.strategy.as_strategy` builds an equal strategy from them.

    Raises:
        ValueError: if the strategy's class isn't registered, or an option can't be written.
    """
    kinds = (registry.strategies, registry.wrappers)
    if not any(strategy.name in kind and kind.factory(strategy.name) is type(strategy) for kind in kinds):
        raise ValueError(
            f"{strategy!r} can't be written: register its class with register_strategy, so that its name builds it."
        )
    options = {f.name: getattr(strategy, f.name) for f in fields(strategy) if f.init}
    return {"name": strategy.name, **{name: _plain(name, value) for name, value in options.items()}}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Strategy):
        return to_config(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(name, one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(name, one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"The option {name} can't be written: it is a {type(value).__name__}.")

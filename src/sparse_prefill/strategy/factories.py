"""Strategies, estimators and selectors by their registered names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_prefill import registry
from sparse_prefill.strategy.base import Strategy
from sparse_prefill.strategy.composed import Estimator, Selector


def get_strategy(name: str, **options: Any) -> Strategy:
    """Build a strategy by name, or wrap one.

    Args:
        name (str): one of :func:`list_strategies` or :func:`list_wrappers`.
        **options: fields of that strategy; see ``registry.strategies.options(name)``. A wrapper's option ``of`` may be
            a strategy, its name, or a mapping of its name and options.

    Returns:
        Strategy: the strategy.

    Raises:
        ValueError: if the name or an option is unknown, or an option's value is out of range.

    Example:
        >>> get_strategy("a_shape", sink=128, local=1024).local
        1024
        >>> get_strategy("delta", of={"name": "a_shape", "sink": 128}).label
        'delta(a_shape)'
    """
    kind = registry.strategies
    if name not in kind:
        if name not in registry.wrappers:
            raise ValueError(
                f"Unknown strategy {name!r}. There are: {', '.join(list_strategies())}; and to wrap one: "
                f"{', '.join(list_wrappers())}."
            )
        kind = registry.wrappers
    strategy = kind.build(name, options)
    if not isinstance(strategy, Strategy):
        raise ValueError(f"The strategy {name!r} was built as a {type(strategy).__name__}, not as a Strategy.")
    return strategy.named(name)  # functions may build strategies of a shared class


def as_strategy(value: Strategy | str | Mapping[str, Any]) -> Strategy:
    """The strategy that is given itself, by its name, or as a mapping of its ``name`` and options; else ValueError."""
    if isinstance(value, Strategy):
        return value
    if isinstance(value, str):
        return get_strategy(value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str) and all(isinstance(key, str) for key in value):
        return get_strategy(**value)
    raise ValueError(f"A strategy must be a Strategy, a name, or a mapping with a name and options, got {value!r}.")


def list_strategies() -> list[str]:
    """Names of all strategies, sorted, including those of installed third-party packages."""
    return registry.strategies.names()


def list_wrappers() -> list[str]:
    """Names of all wrappers of strategies, sorted. :func:`get_strategy` builds them, too."""
    return registry.wrappers.names()


def get_estimator(name: str, **options: Any) -> Estimator:
    """Build an estimator by name. ``estimator(q, k, prompt)`` returns scores. Errors are those of strategies."""
    return registry.estimators.build(name, options)


def get_selector(name: str, **options: Any) -> Selector:
    """Build a selector by name. ``selector(scores, prompt)`` returns bool. Errors are those of strategies."""
    return registry.selectors.build(name, options)

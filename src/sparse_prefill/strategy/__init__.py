"""Strategies: their base class, composition, building by name, and writing."""

from sparse_prefill.strategy.base import Strategy
from sparse_prefill.strategy.composed import ComposedStrategy, Estimator, Selector
from sparse_prefill.strategy.config import to_config
from sparse_prefill.strategy.factories import (
    as_strategy,
    get_estimator,
    get_selector,
    get_strategy,
    list_strategies,
    list_wrappers,
)

__all__ = [
    "ComposedStrategy",
    "Estimator",
    "Selector",
    "Strategy",
    "as_strategy",
    "get_estimator",
    "get_selector",
    "get_strategy",
    "list_strategies",
    "list_wrappers",
    "to_config",
]

"""Sparse prefill attention for PyTorch: estimators and selectors that emit BlockMasks for FlexAttention."""

from sparse_prefill import estimators, selectors, strategies
from sparse_prefill.attention import block_sparse_attention, dense_attention, sparse_attention
from sparse_prefill.prompt import Prompt
from sparse_prefill.record import Call, record
from sparse_prefill.registry import register_estimator, register_selector, register_strategy
from sparse_prefill.strategy import (
    ComposedStrategy,
    Strategy,
    get_estimator,
    get_selector,
    get_strategy,
    list_strategies,
)

__version__ = "0.1.0"

__all__ = [
    "Call",
    "ComposedStrategy",
    "Prompt",
    "Strategy",
    "block_sparse_attention",
    "dense_attention",
    "estimators",
    "get_estimator",
    "get_selector",
    "get_strategy",
    "list_strategies",
    "record",
    "register_estimator",
    "register_selector",
    "register_strategy",
    "selectors",
    "sparse_attention",
    "strategies",
]

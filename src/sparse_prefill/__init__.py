"""Sparse prefill attention for PyTorch: estimators and selectors that emit BlockMasks for FlexAttention."""

from sparse_prefill import estimators, selectors, strategies, wrappers
from sparse_prefill.attention import sparse_attention
from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.key_state import KeyState
from sparse_prefill.core.layer import Layer, Rope
from sparse_prefill.core.logits import Logits
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.cuda_graphs import CudaGraphs
from sparse_prefill.kernel.block_sparse import block_sparse_attention
from sparse_prefill.kernel.dense import dense_attention
from sparse_prefill.kernel.options import kernel_options
from sparse_prefill.kernel.segments import Segment
from sparse_prefill.plan import Plan
from sparse_prefill.record import Call, record
from sparse_prefill.registry import register_estimator, register_selector, register_strategy, register_wrapper
from sparse_prefill.strategy import (
    ComposedStrategy,
    Strategy,
    get_estimator,
    get_selector,
    get_strategy,
    list_strategies,
    list_wrappers,
)
from sparse_prefill.warmup import warmup
from sparse_prefill.wrappers.base import Wrapper

__version__ = "0.1.0"

__all__ = [
    "AttentionInputs",
    "Call",
    "ComposedStrategy",
    "CudaGraphs",
    "KeyState",
    "Layer",
    "Logits",
    "Plan",
    "Prompt",
    "Rope",
    "Segment",
    "Strategy",
    "Wrapper",
    "block_sparse_attention",
    "dense_attention",
    "estimators",
    "get_estimator",
    "get_selector",
    "get_strategy",
    "kernel_options",
    "list_strategies",
    "list_wrappers",
    "record",
    "register_estimator",
    "register_selector",
    "register_strategy",
    "register_wrapper",
    "selectors",
    "sparse_attention",
    "strategies",
    "warmup",
    "wrappers",
]

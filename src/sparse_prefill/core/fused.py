"""Functions that are compiled on a GPU, so that they pass over memory a few times only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as fx_config
from torch import Tensor

# Private in torch, but in torch 2.11 to 2.14. Without it, torch.compile itself decides inside a dispatch mode.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", int)
RECOMPILE_LIMIT = 64  # graphs of one function in a process: block sizes x groups x gradient modes

Function = TypeVar("Function", bound=Callable[..., Any])


def compile_on_gpu(function: Function) -> Function:
    """Compile a function of tensors and numbers for GPUs. If the first tensor is on a CPU, the function runs eagerly.

    The compiled function reads a tensor once for each reduction. Eager operations each read and write it. On a CPU,
    compiling gains nothing: parts of an estimate fit the cache, and eager operations are as fast there.

    Sizes of tensors are symbolic. Numbers are constants of the graph.
    """

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=True)

    @wraps(function)
    def run(x: Tensor, *others: Tensor | float) -> Any:
        # Inside a dispatch mode, such as a FLOP counter, torch doesn't compile. Eager results are the same.
        if not x.is_cuda or torch.compiler.is_compiling() or _dispatch_modes():
            return function(x, *others)
        limits = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
        settings = {**limits, "specialize_int": True, "specialize_float": True}
        with dynamo_config.patch(settings), fx_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled()(x, *others)

    return cast(Function, run)


def exp2_shifted(logits: Tensor, peak: Tensor, scale: float = 1.0) -> Tensor:
    """2 ** (scale * (logits - peak)), in the memory of the logits unless it is compiled."""
    if torch.compiler.is_compiling():  # writing into an argument would be one more pass
        return ((logits - peak) * scale).exp2()
    logits = logits.sub_(peak)
    return (logits if scale == 1.0 else logits.mul_(scale)).exp2_()


def block_sums(x: Tensor, size: int) -> Tensor:
    """Sums over blocks of ``size`` columns, from [..., n] to [..., ceil(n / size)]. The last block may be shorter."""
    whole = x.shape[-1] // size * size
    sums = x[..., :whole].unflatten(-1, (-1, size)).sum(-1)
    return sums if whole == x.shape[-1] else torch.cat([sums, x[..., whole:].sum(-1, keepdim=True)], dim=-1)

"""Functions that are compiled on a GPU, where they need fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

RECOMPILE_LIMIT = 64  # block sizes x groups x gradient modes, of one function in a process

Function = TypeVar("Function", bound=Callable[..., Any])


def compile_on_gpu(function: Function) -> Function:
    """Compile a function of tensors and numbers if its first argument is on a GPU; elsewhere run it eagerly.

    Compiled, it reads the tensor once for each reduction. Eagerly, each step reads and writes it. On a CPU, compiling
    gains nothing: parts of an estimate fit the CPU's cache, where PyTorch's own steps are as fast.

    Sizes of tensors are symbolic, numbers are constants of the compiled function.
    """

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=True)

    @wraps(function)
    def run(x: Tensor, *others: Tensor | float) -> Any:
        # Inside a dispatch mode, such as a FLOP counter, torch doesn't compile. The eager steps compute the same.
        if not x.is_cuda or torch.compiler.is_compiling() or _len_torch_dispatch_stack():
            return function(x, *others)
        limits = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
        settings = {**limits, "specialize_int": True, "specialize_float": True}
        with dynamo_config.patch(settings), fx_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            return compiled()(x, *others)

    return cast(Function, run)


def exp2_shifted(logits: Tensor, peak: Tensor, scale: float = 1.0) -> Tensor:
    """2 to the power of ``scale`` times (logits - peak). It overwrites the logits unless it is compiled."""
    if torch.compiler.is_compiling():  # compiled, writing into an argument would be one more pass over it
        return ((logits - peak) * scale).exp2()
    logits = logits.sub_(peak)
    return (logits if scale == 1.0 else logits.mul_(scale)).exp2_()


def block_sums(x: Tensor, size: int) -> Tensor:
    """Sums over blocks of ``size`` columns, the last of which may be shorter: [..., n] to [..., ceil(n / size)]."""
    whole = x.shape[-1] // size * size
    sums = x[..., :whole].unflatten(-1, (-1, size)).sum(-1)
    return sums if whole == x.shape[-1] else torch.cat([sums, x[..., whole:].sum(-1, keepdim=True)], dim=-1)

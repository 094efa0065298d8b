"""A function that runs compiled or raises an error, since FlexAttention that isn't compiled ignores block lists.

The proof is positive: each kernel counts its runs, and a call without a run raises. All other checks only make the
error earlier and clearer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from threading import Lock, local
from types import FunctionType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch.overrides
import torch.utils._python_dispatch
from torch.utils.flop_counter import FlopCounterMode

Backend = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]
REMEDY = (
    "Sparse attention needs torch.compile, since FlexAttention computes every block without it. Unset "
    "TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, leave torch._dynamo.config.disable False and the stance of "
    "torch.compiler.set_stance at 'default' (or compile every kernel before you set 'fail_on_recompile' or "
    "'eager_on_recompile'), or use the strategy 'dense'."
)
# Stances under which a call runs compiled or fails. Under the others, the first call or all calls run eagerly.
STANCES = ("default", "eager_on_recompile", "fail_on_recompile")


class Compiled:
    """A function under ``torch.compile`` with one graph. Each call runs a kernel of the given backend or raises.

    A kernel counts its runs. A call that ran no kernel raises an error, whatever the cause. If a call fails before its
    kernel runs, the next call compiles a copy of the function's code, since torch doesn't retry code whose compilation
    failed.

    Torch's modes around a call would be compiled in or would make compilation fail. Function modes, such as
    ``torch.device``, FLOP counters and autocast are disabled for the call. Other dispatch modes are an error.
    """

    def __init__(self, function: Callable[..., Any], backend: Backend) -> None:
        self._function = function
        self._backend = backend
        self._compiled: Callable[..., Any] | None = None
        self._lock = Lock()
        self._runs = local()

    def __call__(self, *args: Any) -> Any:
        check_can_run()
        compiled, before = self._current(), self._count()
        try:
            with _without_modes(), torch.autocast(args[0].device.type, enabled=False):
                out = compiled(*args)
        except BaseException:
            # Other stances forbid compiling: nothing was tried, so the compiled kernels are still good.
            if self._count() == before and _stance() == "default":
                self._drop(compiled)
            raise
        if self._count() == before:
            if _stance() == "default":
                self._drop(compiled)
            raise RuntimeError(f"The attention kernel didn't run, so the output may be dense. {REMEDY}")
        return out

    def _current(self) -> Callable[..., Any]:
        with self._lock:
            if self._compiled is None:
                source = self._function
                code = source.__code__.replace()
                copy = FunctionType(code, source.__globals__, source.__name__, source.__defaults__, source.__closure__)
                compiled = torch.compile(copy, fullgraph=True, dynamic=True, backend=self._build)
                if compiled is copy:  # as under TORCHDYNAMO_DISABLE
                    raise RuntimeError(f"torch.compile is switched off. {REMEDY}")
                self._compiled = compiled
            return self._compiled

    def _drop(self, compiled: Callable[..., Any]) -> None:
        with self._lock:
            if self._compiled is compiled:
                self._compiled = None

    def _build(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        kernel = self._backend(graph, inputs)

        def run(*args: Any) -> Any:
            self._runs.count = self._count() + 1
            return kernel(*args)

        return run

    def _count(self) -> int:
        """Kernel runs of this thread."""
        return getattr(self._runs, "count", 0)


def check_can_run() -> None:
    """Raise RuntimeError if torch is set not to run compiled kernels, or a dispatch mode forbids them."""
    is_disabled = dynamo_config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1"
    if is_disabled or _stance() not in STANCES or _forced_backend() is not None:
        raise RuntimeError(f"torch.compile is switched off. {REMEDY}")
    for mode in _dispatch_modes():
        if _counter(mode) is None:
            raise RuntimeError(
                f"Sparse attention can't run inside the dispatch mode {type(mode).__name__}, which can't see the "
                "operations of a compiled kernel: call it outside of the mode, or use the strategy 'dense'."
            )


def count_flops(name: str, flops: Callable[[], int]) -> None:
    """Add the operations of a compiled kernel to each open FLOP counter, which can't count them itself."""
    for mode in _dispatch_modes():
        counter = _counter(mode)
        if counter is not None:
            for module in set(counter.mod_tracker.parents):
                counter.flop_counts[module][name] += flops()


def _counter(mode: Any) -> FlopCounterMode | None:
    counter = getattr(mode, "counter", None)
    return counter if isinstance(counter, FlopCounterMode) else None


# Private parts of torch, which torch 2.11 to 2.14 all have. If one is missing, a check above misses its case, and the
# count of kernel runs still finds it.


def _stance() -> str:
    return getattr(_dynamo_stance(), "stance", "default")


def _forced_backend() -> Any:
    return getattr(_dynamo_stance(), "backend", None)


def _dynamo_stance() -> Any:
    return getattr(torch._dynamo.eval_frame, "_stance", None)


def _dispatch_modes() -> Sequence[Any]:
    return getattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack", tuple)()


@contextmanager
def _without_modes() -> Iterator[None]:
    """Disable the function modes and dispatch modes that are open."""
    function_modes = getattr(torch.overrides, "_len_torch_function_stack", int)()
    pop_mode = getattr(torch.overrides, "_pop_mode_temporarily", nullcontext)
    disable_dispatch_modes = getattr(torch.utils._python_dispatch, "_disable_current_modes", nullcontext)
    with ExitStack() as stack:
        for _ in range(function_modes):
            stack.enter_context(pop_mode())
        stack.enter_context(disable_dispatch_modes())
        yield

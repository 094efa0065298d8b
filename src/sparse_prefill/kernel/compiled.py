"""A function that runs compiled or raises an error: FlexAttention that isn't compiled ignores block lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock, local
from types import FunctionType
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch.overrides import _len_torch_function_stack, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

Backend = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]
REMEDY = (
    "Sparse attention needs torch.compile, since FlexAttention computes every block without it. Unset "
    "TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, leave torch._dynamo.config.disable False and the stance of "
    "torch.compiler.set_stance at 'default' (or compile every kernel before you set 'fail_on_recompile' or "
    "'eager_on_recompile'), or take the strategy 'dense'."
)
# Stances under which a call runs compiled or fails. Under others, calls run eagerly, some of them only at first.
STANCES = ("default", "eager_on_recompile", "fail_on_recompile")


class Compiled:
    """A function under ``torch.compile`` with one graph, whose every call has run a kernel of its own backend.

    The backend's kernel leaves a mark when it runs. A call without a mark raises an error, whatever kept the kernel
    from running. After a call that fails before the mark, the next one compiles a copy of the function's code, since
    torch doesn't compile code again whose compilation failed.

    Modes of torch around a call would be compiled in, or would make that fail. Function modes, such as
    ``torch.device``, FLOP counters and autocast are lifted, other dispatch modes are refused.
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
            with _lifted_modes(), torch.autocast(args[0].device.type, enabled=False):
                out = compiled(*args)
        except BaseException:
            # Other stances forbid to compile, so nothing was tried, and the kernels that are there stay.
            if self._count() == before and _stance() == "default":
                self._drop(compiled)
            raise
        if self._count() == before:
            if _stance() == "default":
                self._drop(compiled)
            raise RuntimeError(f"The attention kernel wasn't run, and what ran in its place isn't sparse. {REMEDY}")
        return out

    def _current(self) -> Callable[..., Any]:
        with self._lock:
            if self._compiled is None:
                of = self._function
                code = of.__code__.replace()
                copy = FunctionType(code, of.__globals__, of.__name__, of.__defaults__, of.__closure__)
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
        """How many kernels were run by this thread."""
        return getattr(self._runs, "count", 0)


def check_can_run() -> None:
    """Raise RuntimeError where torch says beforehand that it won't run a compiled kernel, or a mode forbids it."""
    if dynamo_config.disable or _stance() not in STANCES or _forced_backend() is not None:
        raise RuntimeError(f"torch.compile is switched off. {REMEDY}")
    for mode in _get_current_dispatch_mode_stack():
        if _counter(mode) is None:
            raise RuntimeError(
                f"Sparse attention can't run inside the dispatch mode {type(mode).__name__}, which couldn't look into "
                "its compiled kernel: call it outside of the mode, or take the strategy 'dense'."
            )


def count_flops(name: str, flops: Callable[[], int]) -> None:
    """Add operations, which no counter sees inside a compiled kernel, to each FLOP counter that is open."""
    for mode in _get_current_dispatch_mode_stack():
        counter = _counter(mode)
        if counter is not None:
            for module in set(counter.mod_tracker.parents):
                counter.flop_counts[module][name] += flops()


def _counter(mode: Any) -> FlopCounterMode | None:
    counter = getattr(mode, "counter", None)
    return counter if isinstance(counter, FlopCounterMode) else None


def _stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


def _forced_backend() -> Any:
    return getattr(torch._dynamo.eval_frame._stance, "backend", None)


@contextmanager
def _lifted_modes() -> Iterator[None]:
    """Without the modes of torch that are open here."""
    with ExitStack() as stack:
        for _ in range(_len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(_disable_current_modes())
        yield

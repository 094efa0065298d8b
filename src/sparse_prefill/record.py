"""Records of attention calls: how dense they were, and how long their stages took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

from sparse_prefill.core.logits import PLAIN, Logits
from sparse_prefill.core.prompt import Prompt

STAGE_LABEL = "sparse_prefill."  # prefix of stage names in traces of torch.profiler


class SparseCallTensors(NamedTuple):
    """Tensors of a sparse call. Its queries are those for scoring, which include the scale of the logits.

    Shapes: q [B, Hq, M, D]; k [B, Hkv, N, D]; v [B, Hkv, N, Dv]; out [B, Hq, M, Dv]; keep bool, broadcastable to
    [B, Hq, n_q, n_k]; logits: soft cap and sinks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    keep: Tensor
    logits: Logits = PLAIN


class Inspector(Protocol):
    """A function that is called after each sparse call. A method ``dense(call, prompt)`` gets dense calls."""

    def __call__(self, call: Call, seen: SparseCallTensors, prompt: Prompt, /) -> None: ...


@dataclass
class Call:
    """One call of :func:`~sparse_prefill.sparse_attention`.

    Args:
        strategy (str): label of the strategy: its name and, for a wrapper, the name of the wrapped one.
        q_len (int): query tokens.
        kv_len (int): key tokens.
        dense (str | None): why it ran dense ("decode", "min_length", …), or None if it ran sparse.
        density (Tensor): computed blocks as a share of the visible ones, fp32 [B, Hq] on the CPU. It counts the keep
            table and additions of wrappers, such as segments or dense rows.
        seconds (dict[str, float]): wall-clock seconds of "estimate", "select", "table" and "kernel".
    """

    strategy: str
    q_len: int
    kv_len: int
    dense: str | None = None
    density: Tensor = field(default_factory=lambda: torch.ones(1, 1))
    seconds: dict[str, float] = field(default_factory=dict)


class Recorder:
    """Collects calls while :func:`record` is open."""

    def __init__(self, inspect: Inspector | None) -> None:
        self.calls: list[Call] = []
        self.inspect = inspect
        self.begin()

    def begin(self) -> None:
        """Start a call, and drop stages of a failed call or of a strategy that was called directly."""
        self.seconds: dict[str, float] = {}
        self.work: Tensor | None = None  # blocks that kernels computed, [B, Hq]

    def add_work(self, blocks: Tensor) -> None:
        """Count blocks that a kernel computes, broadcastable to [B, Hq]."""
        self.work = blocks if self.work is None else self.work + blocks

    def take_work(self, q: Tensor, keep: Tensor) -> Tensor:
        """The blocks computed since the last call, [B, Hq]; those of ``keep`` if no kernel of the library ran."""
        work = keep.sum((-2, -1)) if self.work is None else self.work
        self.work = None
        return work.expand(*q.shape[:2])

    def add_dense(self, strategy: str, prompt: Prompt, reason: str) -> None:
        call = Call(strategy, prompt.q_len, prompt.kv_len, dense=reason, seconds=self.seconds)
        self._add(call)
        inspect_dense = getattr(self.inspect, "dense", None)
        if inspect_dense is not None:
            inspect_dense(call, prompt)

    def add_sparse(self, strategy: str, prompt: Prompt, seen: SparseCallTensors) -> None:
        visible = prompt.visible(seen.keep.device).sum((-2, -1))
        work = self.take_work(seen.q, seen.keep)
        density = (work / visible.clamp(min=1)).float().cpu()  # 0 if all tokens are padding
        call = Call(strategy, prompt.q_len, prompt.kv_len, density=density, seconds=self.seconds)
        self._add(call)
        if self.inspect is not None:
            self.inspect(call, seen, prompt)

    def _add(self, call: Call) -> None:
        self.calls.append(call)
        self.begin()


_recorder: ContextVar[Recorder | None] = ContextVar("sparse_prefill_recorder", default=None)


@contextmanager
def record(inspect: Inspector | None = None) -> Iterator[list[Call]]:
    """Record every attention call inside the ``with`` block.

    Recording waits for the device between stages, so that their seconds are correct. That slows the run, so don't time
    it as a whole at the same time. In traces of ``torch.profiler``, stages are spans "sparse_prefill.estimate" and so
    on.

    Args:
        inspect (Inspector | None): called as ``inspect(call, seen, prompt)`` after each sparse call; ``seen`` holds its
            tensors and its keep table. A :class:`~sparse_prefill.evaluation.Collector`, for example, measures recall.
            If it has a method ``dense(call, prompt)``, that is called after each dense call. Default: None.

    Yields:
        list[Call]: the calls so far, in order.

    Example:
        >>> with record() as calls:
        ...     out = sparse_attention(q, k, v, "a_shape")
        >>> calls[0].density.mean()
    """
    recorder = Recorder(inspect)
    token = _recorder.set(recorder)
    try:
        yield recorder.calls
    finally:
        _recorder.reset(token)


def recorder() -> Recorder | None:
    """The open recorder, or None."""
    return _recorder.get()


def note_pairs(allowed: Tensor, block_size: int) -> None:
    """Count attention over single token pairs, bool [B or 1, 1, rows, keys], in the open recorder, for all heads."""
    if (active := _recorder.get()) is not None:
        active.add_work(allowed.sum((-2, -1)) / block_size**2)


def stage(name: str, device: torch.device):
    """A context that times a stage of the current call if a recorder is open, and else does nothing."""
    active = _recorder.get()
    return nullcontext() if active is None else _timed(active, name, device)


@contextmanager
def _timed(active: Recorder, name: str, device: torch.device) -> Iterator[None]:
    _wait(device)
    begin = time.perf_counter()
    with record_function(f"{STAGE_LABEL}{name}"):
        yield
        _wait(device)
    active.seconds[name] = active.seconds.get(name, 0.0) + time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

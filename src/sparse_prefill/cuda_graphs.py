"""CUDA graphs of attention calls whose shapes repeat."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextvars import ContextVar, Token
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.key_state import KeyState
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.kernel.options import given_options
from sparse_prefill.record import recorder
from sparse_prefill.strategy import Strategy

Attend = Callable[[AttentionInputs, Strategy, KeyState | None], Tensor]
MAX_KINDS_CALLED_ONCE = 1024  # remembered until their second call, which is captured


class CudaGraphs:
    """Inside the ``with`` block, sparse attention on a GPU replays CUDA graphs of earlier calls of the same kind.

    The host launches about a hundred kernels for a call. Up to 32K tokens that may take longer than the GPU's work. A
    graph is one launch. The first call of a kind runs as usual, the second is captured, and later ones are replayed.
    Layers of a model with the same shapes and strategy are one kind, so a prompt of a new length gains from its third
    layer on. A graph owns buffers for queries, keys and values: inputs are copied in, and the output is copied out.

    A kind is given by shapes, dtype, layout in memory, strategy, lengths, scale, soft cap, sinks and kernel options.
    These calls run as usual: dense ones, chunks after a prefix, layers that reuse another layer's table, and all
    calls while :func:`~sparse_prefill.record` is open or another graph is being captured. Prompts under a strategy's
    ``min_length`` are dense. Graphs save time from 8K to 16K tokens on, so set a ``min_length`` below the default.

    Use one object on one stream at a time. Its graphs are freed with it.

    Args:
        most (int): largest number of graphs. The least recently used one is dropped first. Default: 4.

    Raises:
        ValueError: if ``most`` isn't a whole number of at least 1; at a call, if tensors aren't on a CUDA device.

    Example:
        >>> graphs = CudaGraphs()
        >>> with torch.inference_mode(), graphs:
        ...     out = sparse_attention(q, k, v, get_strategy("flex_prefill", min_length=8192))
    """

    def __init__(self, most: int = 4) -> None:
        check_tokens("most", most, least=1)
        self.most = most
        self._graphs: dict[Hashable, _Graph] = {}
        self._called_once: dict[Hashable, Strategy] = {}  # values keep strategies alive, so that ids stay unique
        self._pool: Any = None
        self._entered: list[Token] = []

    def __len__(self) -> int:
        """Number of graphs."""
        return len(self._graphs)

    def __enter__(self) -> CudaGraphs:
        self._entered.append(_open.set(self))
        return self

    def __exit__(self, *error: object) -> None:
        _open.reset(self._entered.pop())

    def attend(self, run: Attend, inputs: AttentionInputs, strategy: Strategy, state: KeyState | None) -> Tensor:
        """Call ``run`` with the other arguments, directly or through a graph, and return its result."""
        if not _on_gpu(inputs.q):
            raise ValueError(
                f"CudaGraphs need tensors on a CUDA device, and q is on {inputs.q.device}: attend without them."
            )
        if _is_capturing() or not _can_be_replayed(inputs, strategy):
            return run(inputs, strategy, state)
        key = _kind(inputs, strategy)
        graph = self._graphs.pop(key, None)
        if graph is None and key not in self._called_once:
            self._called_once[key] = strategy
            if len(self._called_once) > MAX_KINDS_CALLED_ONCE:
                del self._called_once[next(iter(self._called_once))]
            return run(inputs, strategy, state)
        if graph is None:
            while len(self._graphs) >= self.most:
                del self._graphs[next(iter(self._graphs))]
            self._pool = self._pool or _new_pool()
            graph = _Graph(run, inputs, strategy, self._pool)
        self._graphs[key] = graph  # as the most recently used
        return graph.replayed(inputs, state)


_open: ContextVar[CudaGraphs | None] = ContextVar("sparse_prefill_cuda_graphs", default=None)


def open_graphs() -> CudaGraphs | None:
    """The graphs of the innermost ``with`` block, or None outside."""
    return _open.get()


class _Graph:
    """The graph of one kind of call, with its input and output tensors."""

    def __init__(self, run: Attend, inputs: AttentionInputs, strategy: Strategy, pool: Any) -> None:
        q, k, v = (torch.empty_like(x).copy_(x) for x in (inputs.q, inputs.k, inputs.v))
        logits = inputs.logits
        if logits.sinks is not None:
            logits = replace(logits, sinks=logits.sinks.detach().clone())
        # Tables computed during capture have no values before the first replay, so the graph gets a separate prompt.
        self.inputs = AttentionInputs(q=q, k=k, v=v, prompt=replace(inputs.prompt), logits=logits)
        self.state = KeyState()

        def attend() -> Tensor:
            return run(self.inputs.with_prompt(self.inputs.prompt), strategy, self.state)  # without cached scores

        self.replay, self.out = _captured(attend, pool, q.device, strategy)

    def replayed(self, inputs: AttentionInputs, state: KeyState | None) -> Tensor:
        ours, sinks = self.inputs, inputs.logits.sinks
        pairs = ((ours.q, inputs.q), (ours.k, inputs.k), (ours.v, inputs.v), (ours.logits.sinks, sinks))
        for buffer, given in pairs:
            if buffer is not None and given is not None:
                buffer.copy_(given.detach())
        self.replay()
        if state is not None:
            state.take_over(self.state)
        return self.out.clone()


def _captured(
    attend: Callable[[], Tensor], pool: Any, device: torch.device, strategy: Strategy
) -> tuple[Callable[[], None], Tensor]:
    """The function that replays a call, and the tensor that holds its output."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                attend()  # compiles kernels and computes the prompt's tables
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=pool):
                out = attend()
    except Exception as error:
        error.add_note(
            f"{strategy.label} can't be captured as a CUDA graph, since one of its steps waits for the GPU: run it "
            "outside of CudaGraphs."
        )
        raise
    return graph.replay, out


def _new_pool() -> Any:
    """Memory that the graphs share, since they replay one after the other and outputs are copied at once."""
    return torch.cuda.graph_pool_handle()


def _on_gpu(q: Tensor) -> bool:
    return q.is_cuda


def _is_capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _can_be_replayed(inputs: AttentionInputs, strategy: Strategy) -> bool:
    prompt = inputs.prompt
    if recorder() is not None or strategy.shares_across_layers or prompt.offset or prompt.q_len == 1:
        return False
    return strategy.dense_reason(prompt, inputs.q.device) is None


def _kind(inputs: AttentionInputs, strategy: Strategy) -> Hashable:
    prompt, logits = inputs.prompt, inputs.logits
    try:
        hash(strategy)
        same: Hashable = strategy
    except TypeError:  # some options are mappings
        same = id(strategy)
    tensors = tuple((x.shape, x.stride(), x.dtype, x.device) for x in (inputs.q, inputs.k, inputs.v))
    lengths = prompt.q_len, prompt.block_size, prompt.total_len, prompt.window
    of_logits = logits.scale, logits.softcap, None if logits.sinks is None else logits.sinks.dtype
    modes = torch.is_inference_mode_enabled(), *sorted(given_options().items())
    return same, tensors, lengths, of_logits, modes

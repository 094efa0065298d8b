"""Attention over prompts of lengths that come again, replayed as CUDA graphs."""

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
SEEN = 1024  # kinds of calls that came once and are remembered


class CudaGraphs:
    """Inside the ``with`` block, sparse attention on a GPU is replayed where a call of its kind came before.

    The host launches some hundred kernels for a call, which up to 32K tokens may take longer than the GPU's own work. A
    graph is one launch. The first call of a kind runs as usual, the second is captured, and those that follow are
    replayed; the layers of a model that agree in shapes and strategy are of one kind, so a prompt of a new length
    pays from its third layer on. A graph holds its own queries, keys and values, into which a call's are copied, and
    the output is a copy, too.

    Kinds are told apart by shapes, dtype, layout in memory, strategy, lengths, scale, soft cap, sinks and kernel
    options. Calls that run as usual: dense ones, chunks behind a prefix, layers that reuse the table of another one,
    and all while :func:`~sparse_prefill.record` is open, as it is for statistics, or another graph is captured. Prompts
    under a strategy's ``min_length`` are dense, so give one that is lower than the default: graphs pay from 8K to 16K
    tokens on.

    One object serves one stream at a time. Dropping it frees its graphs.

    Args:
        most (int): graphs to hold; the one that wasn't used for longest goes first. Default: 4.

    Raises:
        ValueError: if ``most`` is no whole number or under 1; at a call, if tensors aren't on a CUDA device.

    Example:
        >>> graphs = CudaGraphs()
        >>> with torch.inference_mode(), graphs:
        ...     out = sparse_attention(q, k, v, get_strategy("flex_prefill", min_length=8192))
    """

    def __init__(self, most: int = 4) -> None:
        check_tokens("most", most, least=1)
        self.most = most
        self._graphs: dict[Hashable, _Graph] = {}
        self._seen: dict[Hashable, Strategy] = {}  # which are held, so that no other one gets their id
        self._pool: Any = None
        self._entered: list[Token] = []

    def __len__(self) -> int:
        """How many graphs are held."""
        return len(self._graphs)

    def __enter__(self) -> CudaGraphs:
        self._entered.append(_open.set(self))
        return self

    def __exit__(self, *error: object) -> None:
        _open.reset(self._entered.pop())

    def attend(self, run: Attend, inputs: AttentionInputs, strategy: Strategy, state: KeyState | None) -> Tensor:
        """What ``run`` returns for the other arguments, run as usual, captured or replayed."""
        if not _on_gpu(inputs.q):
            raise ValueError(
                f"CudaGraphs replay what CUDA devices do, and q is on {inputs.q.device}: attend without them."
            )
        if _is_capturing() or not _can_be_replayed(inputs, strategy):
            return run(inputs, strategy, state)
        key = _kind(inputs, strategy)
        graph = self._graphs.pop(key, None)
        if graph is None and key not in self._seen:
            self._seen[key] = strategy
            if len(self._seen) > SEEN:
                del self._seen[next(iter(self._seen))]
            return run(inputs, strategy, state)
        if graph is None:
            while len(self._graphs) >= self.most:
                del self._graphs[next(iter(self._graphs))]
            self._pool = self._pool or _new_pool()
            graph = _Graph(run, inputs, strategy, self._pool)
        self._graphs[key] = graph  # as the last that was used
        return graph.replayed(inputs, state)


_open: ContextVar[CudaGraphs | None] = ContextVar("sparse_prefill_cuda_graphs", default=None)


def open_graphs() -> CudaGraphs | None:
    """The graphs whose ``with`` block this is, None outside of any."""
    return _open.get()


class _Graph:
    """One kind of call: its graph, what it reads and what it writes."""

    def __init__(self, run: Attend, inputs: AttentionInputs, strategy: Strategy, pool: Any) -> None:
        q, k, v = (torch.empty_like(x).copy_(x) for x in (inputs.q, inputs.k, inputs.v))
        logits = inputs.logits
        if logits.sinks is not None:
            logits = replace(logits, sinks=logits.sinks.detach().clone())
        # Tables made while a graph is captured have no values before it is replayed, so they are no other call's.
        self.inputs = AttentionInputs(q=q, k=k, v=v, prompt=replace(inputs.prompt), logits=logits)
        self.state = KeyState()

        def attend() -> Tensor:
            return run(self.inputs.with_prompt(self.inputs.prompt), strategy, self.state)  # with nothing scored yet

        self.replay, self.out = _captured(attend, pool, q.device, strategy)

    def replayed(self, inputs: AttentionInputs, state: KeyState | None) -> Tensor:
        own = self.inputs
        pairs = ((own.q, inputs.q), (own.k, inputs.k), (own.v, inputs.v), (own.logits.sinks, inputs.logits.sinks))
        for mine, given in pairs:
            if mine is not None and given is not None:
                mine.copy_(given.detach())
        self.replay()
        if state is not None:
            state.take_over(self.state)
        return self.out.clone()


def _captured(
    attend: Callable[[], Tensor], pool: Any, device: torch.device, strategy: Strategy
) -> tuple[Callable[[], None], Tensor]:
    """What replays a call, and the tensor that its output is in."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                attend()  # compiles what isn't yet, and makes the prompt's tables
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=pool):
                out = attend()
    except Exception as error:
        error.add_note(
            f"{strategy.label} can't be captured as a CUDA graph, as something in it waits for the GPU: run it outside "
            "of CudaGraphs."
        )
        raise
    return graph.replay, out


def _new_pool() -> Any:
    """Memory that the graphs share: they are replayed one after the other, and what they write is copied at once."""
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
    except TypeError:  # options that are mappings
        same = id(strategy)
    tensors = tuple((x.shape, x.stride(), x.dtype, x.device) for x in (inputs.q, inputs.k, inputs.v))
    lengths = prompt.q_len, prompt.block_size, prompt.total_len, prompt.window
    of_logits = logits.scale, logits.softcap, None if logits.sinks is None else logits.sinks.dtype
    modes = torch.is_inference_mode_enabled(), *sorted(given_options().items())
    return same, tensors, lengths, of_logits, modes

"""Seconds of a call on a GPU or a CPU, in the ways in which calls are served."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_prefill.evaluation.timing import wait


def replayed(run: Callable[[], object], q: Tensor, repeats: int) -> float:
    """Seconds of a call that a CUDA graph replays."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    want = run()
    with torch.cuda.graph(graph):
        out = run()
    took = seconds(graph.replay, q, repeats)
    if not torch.equal(out, want):
        raise RuntimeError("a replayed graph gives another output")
    return took


def of_device(run: Callable[[], Tensor], q: Tensor, repeats: int) -> float:
    """Seconds without what the host takes to launch a kernel, on a GPU: as a graph."""
    return replayed(run, q, repeats) if q.is_cuda else seconds(run, q, repeats)


def in_a_row(run: Callable[[], object], q: Tensor, repeats: int, calls: int = 10) -> float:
    """Seconds of a call among others, as those of a model's layers: the host launches one while another runs."""
    return seconds(lambda: [run() for _ in range(calls)], q, repeats) / calls


def seconds(run: Callable[[], object], q: Tensor, repeats: int) -> float:
    """Median of some runs behind one that warms up."""
    run()
    values = []
    for _ in range(repeats):
        wait(q)
        begin = time.perf_counter()
        run()
        wait(q)
        values.append(time.perf_counter() - begin)
    return sorted(values)[len(values) // 2]

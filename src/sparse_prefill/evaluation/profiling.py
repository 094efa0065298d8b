"""Profiles of sparse attention: time by stage, the work of each stage, and the rates of the machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparse_prefill.attention import sparse_attention
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.true_mass import true_mass
from sparse_prefill.evaluation.blocks import oracle_density, spread_blocks
from sparse_prefill.evaluation.roofline import Work, kernel_work, least_work
from sparse_prefill.evaluation.timing import QUERY_BLOCKS, STAGES, compare_attention, mean_comparison, wait
from sparse_prefill.record import STAGE_LABEL, record
from sparse_prefill.strategy import Strategy

CEILING_SIZES = {"cpu": (2**28, 2048), "cuda": (2**31, 8192)}  # bytes to copy, rows and columns of square matrices
RUNS = 5
RECALL = 0.95  # of the oracle density in profiles


@torch.inference_mode()
def profile_attention(
    layers: Sequence[tuple[Tensor, Tensor, Tensor]], strategies: Mapping[str, Strategy], *, repeats: int = 5
) -> dict[str, Any]:
    """Times of each strategy by stage, with the least work of each stage.

    Args:
        layers (Sequence[tuple[Tensor, Tensor, Tensor]]): q [B, Hq, M, D], k [B, Hkv, N, D] and v [B, Hkv, N, Dv] of
            one or more layers, of the same shapes.
        strategies (Mapping[str, Strategy]): strategies by name.
        repeats (int): runs of each. Default: 5.

    Returns:
        dict[str, Any]: the results of :func:`~sparse_prefill.evaluation.timing.mean_comparison`; "sdpa gflop/s" and
        "dense flex gflop/s", for the products of all visible blocks; "oracle density at 0.95", the smallest density
        with this recall in a layer, mean over the layers; and in the row of each strategy

        * "rest", seconds of the whole call minus those of its stages: launches, checks and gaps between stages. On a
          GPU, recording waits after each stage and the call doesn't, so it may be negative;
        * "overhead / sdpa", seconds of all stages except the kernel over those of dense SDPA;
        * "limit over sdpa", the ideal speed-up over SDPA: oracle blocks at the strategy's recall, no overhead, kernel
          time proportional to density;
        * "work", the least work of each stage, see :func:`~sparse_prefill.evaluation.roofline.least_work`, mean over
          the layers: "gflop", "mb", for the kernel "mb at most", the achieved "gflop/s" and "gb/s", and "peak mib", the
          most memory that torch allocated during the stage beyond what it held at its start, of any layer;
        * on a GPU "host", seconds until the call returns, with everything launched, and "device", seconds between its
          first and its last event on the GPU.

    Raises:
        ValueError: if there is no layer, or the tensors and the strategies don't fit each other.
    """
    if not layers:
        raise ValueError("A profile needs at least one layer, got none.")
    prompt = Prompt(q_len=layers[0][0].shape[2], kv_len=layers[0][1].shape[2])
    compared = [compare_attention(*qkv, strategies, repeats=repeats, prompt=prompt) for qkv in layers]
    found = mean_comparison(compared, strategies)
    everything = kernel_work(*layers[0], prompt.visible(layers[0][0].device), prompt).flops / 1e9
    found |= {f"{name} gflop/s": everything / found[name] for name in ("sdpa", "dense flex")}
    blocks = spread_blocks(prompt.n_q, QUERY_BLOCKS)
    least = [oracle_density(true_mass(q, k, prompt, blocks), RECALL, prompt, blocks) for q, k, _ in layers]
    found[f"oracle density at {RECALL}"] = statistics.mean(least)
    for row, strategy in zip(found["strategies"], strategies.values(), strict=True):
        of = prompt.on_grid(strategy.block_size)
        row["rest"] = row["total"] - sum(row[stage] for stage in STAGES)
        row["overhead / sdpa"] = sum(row[stage] for stage in STAGES[:-1]) / found["sdpa"]
        row["limit over sdpa"] = found["sdpa"] / (row["oracle density"] * found["dense flex"])
        row["work"] = _work(layers, strategy, of, row)
        if layers[0][0].is_cuda:
            row |= _launches(layers[0], strategy, of)
    return found


def growth(shorter: Mapping[str, Any], longer: Mapping[str, Any]) -> dict[str, float]:
    """The power of the length with which the time of attention grows; that of dense attention is 2.

    Args:
        shorter, longer (Mapping[str, Any]): results of :func:`profile_attention` at two lengths, given as "tokens".

    Returns:
        dict[str, float]: the exponent of "sdpa" and of each strategy, by name.

    Raises:
        ValueError: if the two lengths are equal.
    """
    if shorter["tokens"] == longer["tokens"]:
        raise ValueError(f"Growth is between two lengths, got {longer['tokens']} tokens twice.")
    times = [
        {"sdpa": case["sdpa"], **{row["name"]: row["total"] for row in case["strategies"]}}
        for case in (shorter, longer)
    ]
    factor = math.log(longer["tokens"] / shorter["tokens"])
    return {name: math.log(times[1][name] / seconds) / factor for name, seconds in times[0].items()}


def ceilings(dtypes: Sequence[torch.dtype], device: torch.device | str = "cpu") -> dict[str, float]:
    """The highest rates that the machine reaches: of one large copy, and of one large matrix product per dtype.

    Args:
        dtypes (Sequence[torch.dtype]): dtypes of the matrices.
        device (torch.device | str): device of the matrices. Default: "cpu".

    Returns:
        dict[str, float]: "copy gb/s", bytes read plus bytes written, and "DTYPE gflop/s" for each dtype.
    """
    size, n = CEILING_SIZES[torch.device(device).type]
    source = torch.zeros(size // 4, device=device)
    found = {"copy gb/s": 2 * size / _fastest(partial(torch.empty_like(source).copy_, source), source) / 1e9}
    for dtype in dtypes:
        matrix = torch.randn(n, n, device=device).to(dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"{name} gflop/s"] = 2 * n**3 / _fastest(partial(torch.matmul, matrix, matrix), matrix) / 1e9
    return found


def peak_bytes(q: Tensor, k: Tensor, v: Tensor, strategy: Strategy, prompt: Prompt) -> dict[str, int]:
    """Peak memory that torch allocated in each stage beyond what it held at the stage's start, in bytes.

    It is counted from allocations and frees, on CPUs and GPUs alike. Scratch memory of a compiled CPU kernel isn't
    counted; it is a few blocks for each thread.
    """
    run = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with run, record():
        sparse_attention(q, k, v, strategy, prompt=prompt)
    kineto: Any = run.profiler
    events = kineto.kineto_results.events()
    stages, changes = [], []
    for event in events:
        name, begin = event.name(), event.start_ns()
        if name.startswith(STAGE_LABEL):
            stages.append((name.removeprefix(STAGE_LABEL), begin, begin + event.duration_ns()))
        elif name == "[memory]" and event.device_type().name.lower() == q.device.type:
            changes.append((begin, event.nbytes()))
    changes.sort()
    peaks: dict[str, int] = {}
    for name, begin, end in stages:
        held = 0
        for at, size in changes:
            if begin <= at <= end:
                held += size
                peaks[name] = max(peaks.get(name, 0), held)
    return peaks


def tables(case: Mapping[str, Any]) -> str:
    """Results of :func:`profile_attention` as two Markdown tables: times in ms, and the work of stages."""
    times = [
        "| strategy | density | recall | estimate | select | table | kernel | rest | attention, ms | against SDPA "
        "| limit | overhead / SDPA | kernel / (density x dense flex) |",
        "|---" * 13 + "|",
    ]
    work = [
        "| strategy | stage | GFLOP | GFLOP/s | MB | GB/s | peak MiB |",
        "|---" * 7 + "|",
    ]
    for row in case["strategies"]:
        stages = " | ".join(_ms(row[key]) for key in (*STAGES, "rest", "total"))
        times.append(
            f"| `{row['name']}` | {row['density']:.2f} | {row['recall']:.2f} | {stages} "
            f"| {row['speed-up over sdpa']:.2f}x | {row['limit over sdpa']:.2f}x | {row['overhead / sdpa']:.3f} "
            f"| {row['kernel / (density x dense flex)']:.2f} |"
        )
        for stage in ("estimate", "kernel"):
            done = row["work"][stage]
            moved = f"{done['mb']:.1f}" + (f" to {done['mb at most']:.1f}" if "mb at most" in done else "")
            work.append(
                f"| `{row['name']}` | {stage} | {done['gflop']:.2f} | {_rate(done['gflop/s'])} | {moved} "
                f"| {_rate(done['gb/s'])} | {done['peak mib']:.1f} |"
            )
    return "\n".join([*times, "", *work])


def _work(
    layers: Sequence[tuple[Tensor, Tensor, Tensor]], strategy: Strategy, prompt: Prompt, seconds: Mapping[str, float]
) -> dict[str, dict[str, float | None]]:
    """Work, rates and peak memory of each stage."""
    works = [least_work(*qkv, strategy, prompt) for qkv in layers]
    peaks = [peak_bytes(*qkv, strategy, prompt) for qkv in layers]
    return {
        stage: _work_of_stage([work[stage] for work in works], seconds[stage], max(p.get(stage, 0) for p in peaks))
        for stage in STAGES
    }


def _work_of_stage(works: Sequence[Work], seconds: float, peak: int) -> dict[str, float | None]:
    """Means over the layers, and the rates with mean seconds."""
    gflop = statistics.mean(work.flops for work in works) / 1e9
    mb = statistics.mean(work.least_bytes for work in works) / 1e6
    row: dict[str, float | None] = {"gflop": gflop, "mb": mb}
    if works[0].most_bytes is not None:
        row["mb at most"] = statistics.mean(work.most_bytes or 0 for work in works) / 1e6
    row["gflop/s"] = gflop / seconds if seconds and gflop else None
    row["gb/s"] = mb / 1e3 / seconds if seconds and mb else None
    row["peak mib"] = peak / 2**20
    return row


def _launches(qkv: tuple[Tensor, Tensor, Tensor], strategy: Strategy, prompt: Prompt) -> dict[str, float]:
    """Median seconds of a call on the host and on the GPU."""
    host, device = [], []
    for _ in range(RUNS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        first.record()
        sparse_attention(*qkv, strategy, prompt=prompt)
        last.record()
        host.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        device.append(first.elapsed_time(last) / 1e3)
    return {"host": statistics.median(host), "device": statistics.median(device)}


def _fastest(run: Callable[[], object], where: Tensor) -> float:
    """Seconds of the fastest run, after one that warms up."""
    run()
    found = []
    for _ in range(RUNS):
        wait(where)
        begin = time.perf_counter()
        run()
        wait(where)
        found.append(time.perf_counter() - begin)
    return min(found)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"

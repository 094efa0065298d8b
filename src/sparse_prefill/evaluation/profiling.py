"""Where the time of sparse attention goes: stages, what each has to do, and how fast the machine could do it."""

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

LARGE = {"cpu": (2**28, 2048), "cuda": (2**31, 8192)}  # bytes to copy, rows and columns of matrices to multiply
RUNS = 5
RECALL = 0.95  # that lengths are compared at


@torch.inference_mode()
def profile_attention(
    layers: Sequence[tuple[Tensor, Tensor, Tensor]], strategies: Mapping[str, Strategy], *, repeats: int = 5
) -> dict[str, Any]:
    """Times of each strategy by stage, beside what the stages have to do.

    Args:
        layers (Sequence[tuple[Tensor, Tensor, Tensor]]): q [B, Hq, M, D], k [B, Hkv, N, D] and v [B, Hkv, N, Dv] of
            one or more layers, of the same shapes.
        strategies (Mapping[str, Strategy]): by name.
        repeats (int): runs of each. Default: 5.

    Returns:
        dict[str, Any]: as of :func:`~sparse_prefill.evaluation.timing.mean_comparison`; "sdpa gflop/s" and
        "dense flex gflop/s", of the products of all visible blocks; "oracle density at 0.95", the least that could hold
        this recall in a layer, mean over the layers; and in the row of each strategy

        * "rest", seconds of the whole call less those of its stages: launches, checks and what lies between stages. On
          a GPU, recording waits after each stage and the call doesn't, so it may be negative;
        * "overhead / sdpa", seconds of all stages but the kernel over those of dense SDPA;
        * "limit over sdpa", how many times as fast as SDPA it would be with the blocks that an oracle needs for its
          recall, no overhead, and a kernel that takes their share of dense FlexAttention;
        * "work", the least work of each stage, see :func:`~sparse_prefill.evaluation.roofline.least_work`, mean over
          the layers: "gflop", "mb", for the kernel "mb at most", the achieved "gflop/s" and "gb/s", and "peak mib", the
          most memory that torch allocated during the stage beyond what it held at its start, of any layer;
        * on a GPU "host", seconds until the call has launched everything and returns, and "device", seconds between
          its first and its last event there.

    Raises:
        ValueError: if there is no layer, or the tensors and the strategies don't fit each other.
    """
    if not layers:
        raise ValueError("There must be a layer to profile, got none.")
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
        works = [least_work(*qkv, strategy, of) for qkv in layers]
        peaks = [peak_bytes(*qkv, strategy, of) for qkv in layers]
        row["work"] = {
            stage: _told([work[stage] for work in works], row[stage], max(peak.get(stage, 0) for peak in peaks))
            for stage in STAGES
        }
        if layers[0][0].is_cuda:
            row |= _launches(layers[0], strategy, of)
    return found


def growth(shorter: Mapping[str, Any], longer: Mapping[str, Any]) -> dict[str, float]:
    """With which power of the length the time of attention grows: 2 is that of dense attention.

    Args:
        shorter, longer (Mapping[str, Any]): what :func:`profile_attention` found at two lengths, told by "tokens".

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
    """What the machine reaches at best: one large copy, and for each dtype one large product of matrices.

    Args:
        dtypes (Sequence[torch.dtype]): of the matrices.
        device (torch.device | str): where. Default: "cpu".

    Returns:
        dict[str, float]: "copy gb/s", bytes read plus bytes written, and "DTYPE gflop/s" for each dtype.
    """
    size, n = LARGE[torch.device(device).type]
    source = torch.zeros(size // 4, device=device)
    found = {"copy gb/s": 2 * size / _fastest(partial(torch.empty_like(source).copy_, source), source) / 1e9}
    for dtype in dtypes:
        matrix = torch.randn(n, n, device=device).to(dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"{name} gflop/s"] = 2 * n**3 / _fastest(partial(torch.matmul, matrix, matrix), matrix) / 1e9
    return found


def peak_bytes(q: Tensor, k: Tensor, v: Tensor, strategy: Strategy, prompt: Prompt) -> dict[str, int]:
    """The most memory that torch allocated in each stage beyond what it held at the stage's begin, in bytes.

    Counted from allocations and frees, on CPUs and GPUs alike. Scratch memory that a compiled CPU kernel takes by
    itself isn't among them; it is small, a few blocks for each thread.
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
    """What :func:`profile_attention` found as two Markdown tables: times in ms, and what the stages do."""
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


def _told(works: Sequence[Work], seconds: float, peak: int) -> dict[str, float | None]:
    """One stage: means over the layers, and the rates that they give in mean seconds."""
    gflop = statistics.mean(work.flops for work in works) / 1e9
    mb = statistics.mean(work.least_bytes for work in works) / 1e6
    told: dict[str, float | None] = {"gflop": gflop, "mb": mb}
    if works[0].most_bytes is not None:
        told["mb at most"] = statistics.mean(work.most_bytes or 0 for work in works) / 1e6
    told["gflop/s"] = gflop / seconds if seconds and gflop else None
    told["gb/s"] = mb / 1e3 / seconds if seconds and mb else None
    told["peak mib"] = peak / 2**20
    return told


def _launches(qkv: tuple[Tensor, Tensor, Tensor], strategy: Strategy, prompt: Prompt) -> dict[str, float]:
    """Medians of the host's and of the GPU's seconds of a call."""
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
    """Seconds of the fastest of some runs behind one that warms up."""
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

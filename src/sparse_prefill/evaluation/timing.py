"""Time attention: dense kernels and strategies, in turns and stage by stage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_prefill.attention import sparse_attention
from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.true_mass import true_mass
from sparse_prefill.evaluation.blocks import oracle_density, recall, spread_blocks
from sparse_prefill.kernel.block_lists import block_tables
from sparse_prefill.kernel.flex import attend
from sparse_prefill.models.transformers.stats import LayerStats
from sparse_prefill.plan import Plan
from sparse_prefill.record import record
from sparse_prefill.strategy import Strategy

STAGES = ("estimate", "select", "table", "kernel")
QUERY_BLOCKS = 12  # in which recall is measured
Times = dict[str, float]


@torch.inference_mode()
def time_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strategies: Mapping[str, Strategy],
    *,
    repeats: int = 5,
    dense: bool = True,
    prompt: Prompt | None = None,
) -> dict[str, Times]:
    """Time attention over the same tensors.

    All candidates run once to compile and warm up, and then in turns, so that a change in the machine's load affects
    all of them alike.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        v (Tensor): values [B, Hkv, N, Dv].
        strategies (Mapping[str, Strategy]): strategies by name, bound to their layer if they need that.
        repeats (int): runs of each, 1 or more. Default: 5.
        dense (bool): also time causal SDPA and dense FlexAttention. Default: True.
        prompt (Prompt | None): what the tokens are; layers of a model share one, and the tables in it. Default: one
            causal prompt of these lengths.

    Returns:
        dict[str, Times]: median seconds by name. "attention" is the whole call. Strategies also have "estimate",
        "select", "table" and "kernel", from separate runs, since recording waits between the stages. Dense attention
        is "sdpa", the fastest of the kernels that take the inputs, and "dense flex".

    Raises:
        ValueError: if there are no repeats, or the tensors, the strategies and the prompt don't fit each other.
    """
    check_tokens("repeats", repeats, least=1)
    prompt = prompt or Prompt(q_len=q.shape[2], kv_len=k.shape[2])
    calls = _dense_calls(q, k, v, prompt) if dense else {}
    stages: dict[str, Callable[[], Times]] = {}
    for name, strategy in strategies.items():
        of = prompt.on_grid(strategy.block_size)
        calls[name] = partial(sparse_attention, q, k, v, strategy, prompt=of)
        stages[name] = partial(_stages, q, k, v, strategy, of)
    seconds, parts = _in_turns(calls, stages, repeats, wait_for=q)
    found = {name: {"attention": seconds[name], **parts[name]} for name in strategies}
    if dense:
        found["sdpa"] = {"attention": min(value for name, value in seconds.items() if name.startswith("sdpa "))}
        found["dense flex"] = {"attention": seconds["dense flex"]}
    return found


def _dense_calls(q: Tensor, k: Tensor, v: Tensor, prompt: Prompt) -> dict[str, Callable[[], object]]:
    """Dense attention: the kernels of SDPA, and FlexAttention over all visible blocks."""
    everything = block_tables(prompt.visible(q.device).expand(1, q.shape[1], -1, -1), prompt)
    calls: dict[str, Callable[[], object]] = {
        f"sdpa {name}": call for name, call in dense_kernels(q, k, v, prompt).items()
    }
    inputs = AttentionInputs(q=q, k=k, v=v, prompt=prompt)
    calls["dense flex"] = lambda: attend(inputs, everything)
    return calls


def _in_turns(
    calls: Mapping[str, Callable[[], object]], stages: Mapping[str, Callable[[], Times]], repeats: int, wait_for: Tensor
) -> tuple[Times, dict[str, Times]]:
    """Median seconds of calls, and of the stages of some, after a first turn that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    parts: dict[str, list[Times]] = {name: [] for name in stages}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            wait(wait_for)
            begin = time.perf_counter()
            call()
            wait(wait_for)
            whole = time.perf_counter() - begin
            split = stages[name]() if name in stages else {}
            if turn:
                seconds[name].append(whole)
                if split:
                    parts[name].append(split)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    of_stages = {name: {s: statistics.median(part[s] for part in of) for s in STAGES} for name, of in parts.items()}
    return medians, of_stages


@torch.inference_mode()
def compare_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strategies: Mapping[str, Strategy],
    *,
    repeats: int = 5,
    query_blocks: int = QUERY_BLOCKS,
    prompt: Prompt | None = None,
) -> dict[str, Any]:
    """Times of :func:`time_attention`, with the density and recall of each strategy.

    Args:
        q, k, v, strategies, repeats, prompt: see :func:`time_attention`.
        query_blocks (int): number of query blocks in which recall is measured. Default: 12.

    Returns:
        dict[str, Any]: seconds of "sdpa" and "dense flex"; "window", the sliding window of the prompt in tokens, or
        None; and "strategies", in their order: seconds ("total" and each stage), "density", "recall", "oracle density"
        and "ran dense", which is 1 or 0.
    """
    times = time_attention(q, k, v, strategies, repeats=repeats, prompt=prompt)
    prompt = prompt or Prompt(q_len=q.shape[2], kv_len=k.shape[2])
    found = []
    for name, strategy in strategies.items():
        seconds = {"total": times[name]["attention"], **{stage: times[name][stage] for stage in STAGES}}
        of = prompt.on_grid(strategy.block_size)
        found.append({**seconds, **_kept(q, k, v, strategy, of, query_blocks)})
    seconds = {"sdpa": times["sdpa"]["attention"], "dense flex": times["dense flex"]["attention"]}
    return {**seconds, "window": prompt.window, "strategies": found}


def _kept(q: Tensor, k: Tensor, v: Tensor, strategy: Strategy, prompt: Prompt, query_blocks: int) -> dict[str, float]:
    """Density and recall of a strategy, the oracle's density for that recall, and whether the call ran dense."""
    blocks = spread_blocks(prompt.n_q, query_blocks)
    mass = true_mass(q, k, prompt, blocks)
    with record() as calls:
        sparse_attention(q, k, v, strategy, prompt=prompt)
    runs_dense = strategy.dense_reason(prompt, q.device) is not None
    kept = 1.0 if runs_dense else float(recall(mass, strategy.keep(q, k, prompt), blocks).mean())
    shares = {"density": float(LayerStats(q.shape[1], calls).density.mean()), "recall": kept}
    return shares | {"oracle density": oracle_density(mass, kept, prompt, blocks), "ran dense": float(runs_dense)}


def mean_comparison(layers: Sequence[Mapping[str, Any]], strategies: Mapping[str, Strategy | Plan]) -> dict[str, Any]:
    """Means over layers of the results of :func:`compare_attention`, with ratios of these means.

    Args:
        layers (Sequence[Mapping[str, Any]]): the results of one or more layers.
        strategies (Mapping[str, Strategy | Plan]): the compared strategies, in the same order.

    Returns:
        dict[str, Any]: "layers", their number; "windows", the sliding window of each; seconds of "sdpa" and
        "dense flex"; and "strategies", a row of each: its "name", the means ("ran dense" is then the share of the
        layers), "speed-up over sdpa", "kernel / (density x dense flex)" and "overhead share".

    Raises:
        ValueError: if there is no layer.
    """
    if not layers:
        raise ValueError("Means need at least one layer, got none.")
    sdpa = statistics.mean(layer["sdpa"] for layer in layers)
    flex = statistics.mean(layer["dense flex"] for layer in layers)
    rows = []
    for i, (name, strategy) in enumerate(strategies.items()):
        of_layers = [layer["strategies"][i] for layer in layers]
        row = {key: statistics.mean(x[key] for x in of_layers) for key in of_layers[0]}
        row["speed-up over sdpa"] = sdpa / row["total"]
        row["kernel / (density x dense flex)"] = row["kernel"] / (row["density"] * flex)
        row["overhead share"] = (row["estimate"] + row["select"] + row["table"]) / row["total"]
        rows.append({"name": name, "strategy": repr(strategy), **row})
    windows = [layer["window"] for layer in layers]
    return {"layers": len(layers), "windows": windows, "sdpa": sdpa, "dense flex": flex, "strategies": rows}


def dense_kernels(q: Tensor, k: Tensor, v: Tensor, prompt: Prompt | None = None) -> dict[str, Callable[[], Tensor]]:
    """Calls of causal SDPA: with torch's choice of the kernel, and on a GPU with each fast kernel for these inputs.

    Prompts that aren't plainly causal, such as chunks and sliding windows, need a mask of M x N bytes.
    """
    mask = None
    if prompt is not None and not (prompt.is_causal and prompt.q_len == prompt.kv_len):
        mask = prompt.may_attend(prompt.query_positions(q.device), torch.arange(prompt.kv_len, device=q.device))

    def sdpa(backend: SDPBackend | None = None) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)

    kernels: dict[str, Callable[[], Tensor]] = {"default": sdpa}
    if q.is_cuda:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                sdpa(backend)
            except RuntimeError:  # this kernel takes other inputs, or isn't in this build
                continue
            kernels[backend.name.lower()] = partial(sdpa, backend)
    return kernels


def _stages(q: Tensor, k: Tensor, v: Tensor, strategy: Strategy, prompt: Prompt) -> Times:
    with record() as calls:
        sparse_attention(q, k, v, strategy, prompt=prompt)
    return {stage: sum(call.seconds.get(stage, 0.0) for call in calls) for stage in STAGES}


def wait(x: Tensor) -> None:
    """Wait until a tensor's device is idle."""
    if x.is_cuda:
        torch.cuda.synchronize()

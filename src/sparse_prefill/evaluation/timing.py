"""Time attention: dense kernels and strategies, which take turns, stage by stage."""

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
QUERY_BLOCKS = 12  # that recall is measured in
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
    """Seconds of attention over the same tensors.

    All candidates run once to compile and warm up, and then in turn, so that a change in the machine's load meets all
    of them alike.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        v (Tensor): values [B, Hkv, N, Dv].
        strategies (Mapping[str, Strategy]): by name, bound to their layer where they need that.
        repeats (int): runs of each, 1 or more. Default: 5.
        dense (bool): time causal SDPA and dense FlexAttention, too. Default: True.
        prompt (Prompt | None): what the tokens are; layers of a model share one, and the tables in it. Default: one
            causal prompt of these lengths.

    Returns:
        dict[str, Times]: medians by name: "attention" for the whole call; of strategies "estimate", "select", "table"
        and "kernel", too, from runs of their own, since recording waits between them. Dense ones are "sdpa", the
        fastest of the kernels that take the inputs, and "dense flex".

    Raises:
        ValueError: if there are no repeats, or the tensors, the strategies and the prompt don't fit each other.
    """
    check_tokens("repeats", repeats, least=1)
    prompt = prompt or Prompt(q_len=q.shape[2], kv_len=k.shape[2])
    runs: dict[str, Callable[[], object]] = {}
    if dense:
        inputs = AttentionInputs(q=q, k=k, v=v, prompt=prompt)
        everything = block_tables(prompt.visible(q.device).expand(1, q.shape[1], -1, -1), prompt)
        runs = {f"sdpa {name}": run for name, run in dense_kernels(q, k, v, prompt).items()}
        runs["dense flex"] = lambda: attend(inputs, everything)
    stages = {}
    for name, strategy in strategies.items():
        of = prompt.on_grid(strategy.block_size)
        runs[name] = partial(sparse_attention, q, k, v, strategy, prompt=of)
        stages[name] = partial(_stages, q, k, v, strategy, of)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    parts: dict[str, list[Times]] = {name: [] for name in stages}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            wait(q)
            begin = time.perf_counter()
            run()
            wait(q)
            whole = time.perf_counter() - begin
            split = stages[name]() if name in stages else {}
            if repeat:  # the first one warms up
                seconds[name].append(whole)
                if split:
                    parts[name].append(split)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    found = {
        name: {"attention": median[name], **{s: statistics.median(part[s] for part in of) for s in STAGES}}
        for name, of in parts.items()
    }
    if dense:
        found["sdpa"] = {"attention": min(value for name, value in median.items() if name.startswith("sdpa "))}
        found["dense flex"] = {"attention": median["dense flex"]}
    return found


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
    """Times of :func:`time_attention`, and what each strategy keeps.

    Args:
        q, k, v, strategies, repeats, prompt: see :func:`time_attention`.
        query_blocks (int): query blocks to measure recall in. Default: 12.

    Returns:
        dict[str, Any]: seconds of "sdpa" and "dense flex", and under "strategies", in their order, seconds ("total" and
        each stage), "density", "recall", "oracle density" and "ran dense", which is 1 or 0; and "window", the sliding
        window of the prompt in tokens, or None.
    """
    times = time_attention(q, k, v, strategies, repeats=repeats, prompt=prompt)
    prompt = prompt or Prompt(q_len=q.shape[2], kv_len=k.shape[2])
    found = []
    for name, strategy in strategies.items():
        of = prompt.on_grid(strategy.block_size)
        blocks = spread_blocks(of.n_q, query_blocks)
        mass = true_mass(q, k, of, blocks)
        with record() as calls:
            sparse_attention(q, k, v, strategy, prompt=of)
        runs_dense = strategy.dense_reason(of, q.device) is not None
        kept = 1.0 if runs_dense else float(recall(mass, strategy.keep(q, k, of), blocks).mean())
        seconds = {"total": times[name]["attention"], **{stage: times[name][stage] for stage in STAGES}}
        shares = {"density": float(LayerStats(q.shape[1], calls).density.mean()), "recall": kept}
        shares |= {"oracle density": oracle_density(mass, kept, of, blocks), "ran dense": float(runs_dense)}
        found.append({**seconds, **shares})
    seconds = {"sdpa": times["sdpa"]["attention"], "dense flex": times["dense flex"]["attention"]}
    return {**seconds, "window": prompt.window, "strategies": found}


def mean_comparison(layers: Sequence[Mapping[str, Any]], strategies: Mapping[str, Strategy | Plan]) -> dict[str, Any]:
    """Means over layers of what :func:`compare_attention` found, and the ratios that they give.

    Returns:
        dict[str, Any]: "layers", how many; "windows", the sliding window of each; seconds of "sdpa" and "dense flex";
        under "strategies" a row of each: its "name", the means ("ran dense" is then the share of the layers),
        "speed-up over sdpa", "kernel / (density x dense flex)" and "overhead share".

    Raises:
        ValueError: if there is no layer.
    """
    if not layers:
        raise ValueError("There must be a layer to take means of, got none.")
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
    """Causal SDPA: what torch chooses, and on a GPU each fast kernel that takes the inputs.

    A prompt that isn't one whole causal one, such as a chunk or a sliding window, is given as a mask of M x N bytes.
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
            except RuntimeError:  # not for these inputs, or not in this build
                continue
            kernels[backend.name.lower()] = partial(sdpa, backend)
    return kernels


def _stages(q: Tensor, k: Tensor, v: Tensor, strategy: Strategy, prompt: Prompt) -> Times:
    with record() as calls:
        sparse_attention(q, k, v, strategy, prompt=prompt)
    return {stage: sum(call.seconds.get(stage, 0.0) for call in calls) for stage in STAGES}


def wait(x: Tensor) -> None:
    """Wait until a tensor's device has nothing left to do."""
    if x.is_cuda:
        torch.cuda.synchronize()

"""Time attention: dense kernels and strategies, which take turns, stage by stage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_prefill.attention import sparse_attention
from sparse_prefill.block_mask import block_tables
from sparse_prefill.kernel import attend
from sparse_prefill.prompt import Prompt
from sparse_prefill.record import record
from sparse_prefill.strategy import Strategy

STAGES = ("estimate", "select", "table", "kernel")
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
    """
    prompt = prompt or Prompt(q_len=q.shape[2], kv_len=k.shape[2])
    runs: dict[str, Callable[[], object]] = {}
    if dense:
        everything = block_tables(prompt.visible(q.device).expand(1, q.shape[1], -1, -1), prompt)
        runs = {f"sdpa {name}": run for name, run in dense_kernels(q, k, v).items()}
        runs["dense flex"] = lambda: attend(q, k, v, everything, prompt)
    stages = {}
    for name, strategy in strategies.items():
        of = prompt.on_grid(strategy.block_size)
        runs[name] = partial(sparse_attention, q, k, v, strategy, prompt=of)
        stages[name] = partial(_stages, q, k, v, strategy, of)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    parts: dict[str, list[Times]] = {name: [] for name in stages}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            _wait(q)
            begin = time.perf_counter()
            run()
            _wait(q)
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


def dense_kernels(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Causal SDPA: what torch chooses, and on a GPU each fast kernel that takes the inputs."""

    def sdpa(backend: SDPBackend | None = None) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

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


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()

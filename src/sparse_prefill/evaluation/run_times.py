"""Time strategies on the queries, keys and values of a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor

from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.evaluation.results import Results
from sparse_prefill.evaluation.steps import OnStep, Steps, Strategies, with_dense
from sparse_prefill.evaluation.timing import STAGES, Times, time_attention
from sparse_prefill.models.at_length import sparse_at_length
from sparse_prefill.models.eval_model import EvalModel
from sparse_prefill.strategy import Strategy, get_strategy


def measure_times(
    subject: EvalModel,
    strategies: Strategies,
    tokens: Tensor,
    results: Results,
    *,
    repeats: int = 5,
    every: int = 1,
    on_step: OnStep | None = None,
) -> None:
    """Time the attention of each strategy on the model's queries, keys and values, in turns.

    Args:
        subject (EvalModel): the model.
        strategies (Mapping[str, Strategy | Plan]): strategies by the names of their rows. "dense" is always timed.
        tokens (Tensor): token ids, int64 [1, s].
        results (Results): gets, in each row, "estimate_ms", "select_ms", "table_ms", "kernel_ms" and "attention_ms",
            which are medians over runs, averaged over layers, and "speedup_attention" over dense attention. "times"
            beside the rows gives date, threads, layers and repeats. Nothing is timed if all rows have times.
        repeats (int): runs of each, 1 or more. Default: 5.
        every (int): time one layer in this many. Default: 1.
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each step. Default: nothing.
    """
    strategies, tokens = with_dense(strategies), subject.check(tokens)
    if all("speedup_attention" in results.row(name) for name in strategies):
        return
    found = time_layers(subject, strategies, tokens, repeats=repeats, every=every, on_step=on_step)
    means = mean_times(found.values())
    results.content["times"] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "layers": len(found),
        "repeats": repeats,
    }
    for name, times in means.items():
        of_row = {f"{part}_ms": 1e3 * times[part] for part in (*STAGES, "attention")}
        of_row["speedup_attention"] = means["dense"]["attention"] / times["attention"]
        results.put(name, of_row)


def time_layers(
    subject: EvalModel,
    strategies: Strategies,
    tokens: Tensor,
    *,
    repeats: int,
    every: int,
    on_step: OnStep | None = None,
) -> dict[int, dict[str, Times]]:
    """Times of :func:`~sparse_prefill.evaluation.timing.time_attention` by layer. Args as for :func:`measure_times`."""
    found = {}

    def measure(index: int, q: Tensor, k: Tensor, v: Tensor, bound: dict[str, Strategy], prompt: Prompt) -> None:
        found[index] = time_attention(q, k, v, bound, repeats=repeats, dense=False, prompt=prompt)

    each_layer(subject, strategies, tokens, measure, every=every, on_step=on_step)
    return found


def each_layer(
    subject: EvalModel,
    strategies: Strategies,
    tokens: Tensor,
    measure: Callable[[int, Tensor, Tensor, Tensor, dict[str, Strategy], Prompt], None],
    *,
    every: int = 1,
    on_step: OnStep | None = None,
) -> None:
    """Run a prompt densely and call a function with the queries, keys and values of some layers.

    Args:
        subject (EvalModel): the model.
        strategies (Mapping[str, Strategy | Plan]): strategies by name. Prompts run sparse however short they are.
            Sliding windows run as in use: those shorter than a strategy's ``min_length`` run dense.
        tokens (Tensor): token ids, int64 [1, s].
        measure (Callable): called as ``measure(index, q, k, v, strategies, prompt)``. The strategies are bound to the
            layer; layers with the same sliding window share the prompt, as in a model.
        every (int): one layer in this many. Default: 1.
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each layer. Default: nothing.
    """
    check_tokens("every", every, least=1)
    tokens = subject.check(tokens)
    places = layers_of(subject)
    prompts: dict[int | None, Prompt] = {}  # by window
    sparse = {name: sparse_at_length(one, tokens.shape[1], subject.device) for name, one in strategies.items()}
    steps = Steps(on_step, len(places[::every]))

    def visit(index: int, q: Tensor, k: Tensor, v: Tensor, seen: Prompt) -> None:
        steps(f"time layer {index}")
        prompt = prompts.setdefault(seen.window, Prompt(q_len=seen.q_len, window=seen.window))
        bound = {name: strategy.for_layer(places[index]) for name, strategy in sparse.items()}
        measure(index, q.contiguous(), k.contiguous(), v.contiguous(), bound, prompt)

    subject.capture(tokens, visit, every)


def mean_times(layers: Iterable[Mapping[str, Times]]) -> dict[str, Times]:
    """Times by name and part, means over layers."""
    layers = list(layers)
    return {
        name: {part: statistics.mean(layer[name][part] for layer in layers) for part in parts}
        for name, parts in layers[0].items()
    }


def layers_of(subject: EvalModel) -> list[Layer]:
    """The :class:`~sparse_prefill.Layer` of each layer of a model."""
    found: list[Layer] = []
    subject.prefill(_NotesLayers(found=found), torch.zeros(1, 2, dtype=torch.int64))
    return found


@dataclass(frozen=True, kw_only=True)
class _NotesLayers(Strategy):
    """Dense attention that notes the layers that it is bound to."""

    found: list[Layer]

    def for_layer(self, layer: Layer) -> Strategy:
        self.found.append(layer)
        return get_strategy("dense")

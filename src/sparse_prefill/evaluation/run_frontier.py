"""Recall over density of strategies at several settings, from one dense run of a text through a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_fraction, check_tokens
from sparse_prefill.evaluation.results import Results
from sparse_prefill.evaluation.scored_layers import (
    ScoredLayer,
    TrueAttention,
    dense_layers_and_windows,
    mean_density,
    measures,
    oracle_curve,
)
from sparse_prefill.evaluation.settings import nearest_steps, needed
from sparse_prefill.evaluation.steps import Failures, OnStep, Steps, reported_failures
from sparse_prefill.models.at_length import sparse_at_length
from sparse_prefill.models.eval_model import EvalModel, LayerInputs
from sparse_prefill.models.observe import observe
from sparse_prefill.strategy import Strategy, get_strategy, to_config

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
ORACLE_RECALLS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)
NEEDED_RECALLS = (0.9, 0.95)  # rows give the density that the strategy needs for them


def measure_frontier(
    subject: EvalModel,
    strategies: Mapping[str, Strategy],
    tokens: Tensor,
    results: Results,
    *,
    every: int = 1,
    densities: Sequence[float] = DENSITIES,
    query_blocks: int = 16,
    on_step: OnStep | None = None,
) -> Failures:
    """Measure strategies at their own settings, and at settings of their tunable options near some densities.

    The model reads the text once, densely, and every strategy scores each layer once, so that a setting only costs a
    selection. Layers therefore see the queries and keys of a dense run; in a sparse prefill, the sparse layers below
    change them. A setting is one value for all layers. Layers that run dense in use, such as sliding windows under a
    strategy's ``min_length``, count as dense: settings are chosen by the density of the other layers, and the measures
    of a row are means over all layers.

    Args:
        subject (EvalModel): the model.
        strategies (Mapping[str, Strategy]): strategies by the names of their rows. Those without a tunable option have
            one setting. They are measured however short the text is.
        tokens (Tensor): token ids, int64 [1, s], of more than one block.
        results (Results): gets a row for each setting, with "strategy", "options" (those that aren't defaults),
            "density", "recall", "worst_recall", "oracle_density", "oracle_gap" and "overlap" as in
            :meth:`~sparse_prefill.evaluation.Collector.summary`, "dense_layers" (layers by the reason why they ran
            dense) and "windows" (layers by the tokens of their sliding windows). The row of the strategy's own setting
            also has "needed", see :func:`~sparse_prefill.evaluation.settings.needed`. "oracle" gets the "density" of
            the best tables at each "recall"; these spread their blocks freely over all layers, heads and query blocks,
            in the block size of most strategies. Strategies that have their rows aren't measured again.
        every (int): measure one layer in this many, from the first on. Default: 1.
        densities (Sequence[float]): densities to find settings near, in (0, 1].
        query_blocks (int): number of query blocks in which recall and oracle are measured. Default: 16.
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each step. Default: nothing.

    Returns:
        dict[str, str]: the errors of strategies that failed, by name; also in the report, under "failures".

    Raises:
        ValueError: if an option is out of range, there is a plan among the strategies, or the text is a single block.
        RuntimeError: if all strategies fail with the same one.
    """
    for name, strategy in strategies.items():
        if not isinstance(strategy, Strategy):
            raise ValueError(f"A frontier takes strategies, and {name} is a {type(strategy).__name__}.")
    check_tokens("every", every, least=1)
    check_tokens("query_blocks", query_blocks, least=1)
    for one in densities:
        check_fraction("densities", one)
    # The row of a strategy's own setting is written last.
    missing = {name: one for name, one in strategies.items() if "recall" not in results.row(name)}
    if not missing:
        return {}
    steps = Steps(on_step, len(range(0, subject.layers, every)) + len(missing))
    run = _DenseRun(missing, tokens.shape[1], every, query_blocks, steps)
    with torch.inference_mode():
        size = mode(strategy.block_size for strategy in strategies.values())
        observe(subject, _BoundLayer(min_length=0, block_size=size), [tokens], run.look)
        results.content.setdefault("oracle", oracle_curve(run.truths, ORACLE_RECALLS))
        for name, strategy in missing.items():
            steps(name)
            layers = run.layers.pop(name)
            if name not in run.errors:
                for row_name, row in _rows(name, strategy, layers, densities):
                    results.put(row_name, row)
    return reported_failures(strategies, run.errors, results)


@dataclass(frozen=True, kw_only=True)
class _BoundLayer(Strategy):
    """Knows the layer of the model, to bind other strategies to it; it never attends."""

    name = "frontier"
    layer: Layer | None = None

    def for_layer(self, layer: Layer) -> Strategy:
        return replace(self, layer=layer)


@dataclass(eq=False)
class _DenseRun:
    """Scores the layers of a dense run with every strategy."""

    strategies: Mapping[str, Strategy]
    tokens: int
    every: int
    query_blocks: int
    steps: Steps
    truths: list[TrueAttention] = field(default_factory=list)
    layers: dict[str, list[ScoredLayer]] = field(init=False)
    errors: dict[str, Exception] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = {name: [] for name in self.strategies}

    def look(self, text: int, inputs: LayerInputs) -> None:
        assert isinstance(inputs.strategy, _BoundLayer)
        assert inputs.strategy.layer is not None
        if inputs.layer % self.every:
            return
        self.steps(f"layer {inputs.layer}")
        truth = TrueAttention.of(inputs, inputs.prompt, self.query_blocks)
        self.truths.append(truth)
        by_size = {inputs.prompt.block_size: truth}
        for name, strategy in self.strategies.items():
            if name in self.errors:
                continue
            try:
                served = sparse_at_length(strategy, self.tokens, inputs.q.device)
                bound = served.for_layer(inputs.strategy.layer)
                size = bound.block_size
                if size not in by_size:
                    prompt = replace(inputs.prompt, block_size=size)
                    by_size[size] = TrueAttention.of(inputs, prompt, self.query_blocks)
                layer = ScoredLayer.of(bound, strategy.tunable_option(), inputs, by_size[size])
                self.layers[name].append(layer)
            except (ValueError, RuntimeError) as error:
                self.errors[name] = error


def _rows(
    name: str, strategy: Strategy, layers: Sequence[ScoredLayer], densities: Sequence[float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and rows of a strategy's settings, its own setting last."""
    points = []
    for options in (*_settings(strategy, layers, densities), {}):
        point = measures(layers, options)
        points.append(point)
        row = {**_described(strategy, options), **point, **dense_layers_and_windows(layers)}
        if not options:
            row["needed"] = [found for recall in NEEDED_RECALLS if (found := needed(points, recall))]
        yield _row_name(name, options), row


def _settings(strategy: Strategy, layers: Sequence[ScoredLayer], densities: Sequence[float]) -> list[dict[str, Any]]:
    """Values of the tunable option near the densities, in ascending density; none without such an option."""
    tunable, layers = strategy.tunable_option(), [layer for layer in layers if layer.dense is None]
    if tunable is None or not layers:
        return []
    scale = {"tokens": layers[0].truth.prompt.kv_len, "block_size": strategy.block_size}

    def options(step: int) -> dict[str, Any]:
        return tunable.options(tunable.value(step, **scale))

    steps = nearest_steps(lambda step: mean_density(layers, options(step)), tunable.steps(**scale), densities)
    return [options(step) for step in steps]


def _row_name(name: str, options: Mapping[str, Any]) -> str:
    """The name of a setting in the form of the command line."""
    given = ",".join(f"{option}={value}" for option, value in options.items())
    return f"{name}{',' if ':' in name else ':'}{given}" if given else name


def _described(strategy: Strategy, options: Mapping[str, Any]) -> dict[str, Any]:
    """Label and options that aren't defaults; files by their names, since folders differ between machines."""
    default = to_config(get_strategy(strategy.name))
    given = to_config(replace(strategy, **options))
    changed = {key: value for key, value in given.items() if value != default[key]}
    if isinstance(changed.get("table"), str):
        changed["table"] = Path(changed["table"]).name
    return {"strategy": strategy.label, "options": changed}

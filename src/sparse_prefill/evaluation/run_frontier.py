"""Recall over density of strategies, by the values of their tunable options, on one text that a model reads densely."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, mode
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_fraction, check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.evaluation import density, oracle_density, overlap, recall, spread_blocks, true_mass, worst
from sparse_prefill.evaluation.results import Results
from sparse_prefill.evaluation.steps import Failures, OnStep, Steps
from sparse_prefill.models.at_length import layers_by, sparse_at_length
from sparse_prefill.models.eval_model import EvalModel, LayerInputs
from sparse_prefill.models.observe import observe
from sparse_prefill.strategy import Strategy, get_strategy, to_config
from sparse_prefill.tunable_option import TunableOption

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
CLOSE = 0.01  # how near a setting's density has to be to the one that is looked for
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)  # of the oracle's curve
TARGETS = (0.9, 0.95)  # recalls that the density to reach them is told of
DIGITS = 6


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
    """Measure strategies at their own settings, and at settings of their tunable options that lie near some densities.

    The model reads the text once, densely, and every strategy scores each layer once: a setting costs its selection
    alone. So layers see the queries and keys of a dense run, where a sparse prefill shows those that sparse layers
    below have changed. A setting is one value for all layers. Layers that run dense in use, such as sliding windows
    under a strategy's ``min_length``, count as such: settings are those whose other layers are near the densities, and
    rows are of all layers.

    Args:
        subject (EvalModel): the model.
        strategies (Mapping[str, Strategy]): by the names of their rows. Those without a tunable option have one
            setting. They are measured however short the text is.
        tokens (Tensor): token ids, int64 [1, s], of more than one block.
        results (Results): gets a row for each setting, with "strategy", "options" (those that aren't defaults),
            "density", "recall", "worst_recall", "oracle_density", "oracle_gap" and "overlap" as in
            :meth:`~sparse_prefill.evaluation.Collector.summary`, and "dense_layers" and "windows", layers by why they
            ran dense and by the tokens of their sliding windows; the row of the strategy itself has "needed", see
            :func:`needed`, besides. "oracle" gets the "density" at each "recall" of the best tables, which spread
            their blocks, of the size that most strategies have, over all layers, heads and query blocks as they like.
            Strategies that have their rows aren't measured again.
        every (int): measure one layer in this many, from the first on. Default: 1.
        densities (Sequence[float]): densities to find settings near, in (0, 1].
        query_blocks (int): query blocks to measure recall and oracle in. Default: 16.
        on_step (Callable | None): called as ``on_step(done, total, text)`` before each step. Default: nothing.

    Returns:
        dict[str, str]: what went wrong, by name of the strategy.

    Raises:
        ValueError: if an option is out of range, there is a plan among the strategies, or the text is a single block.
    """
    for name, strategy in strategies.items():
        if not isinstance(strategy, Strategy):
            raise ValueError(f"A frontier is of strategies, and {name} is a {type(strategy).__name__}.")
    check_tokens("every", every, least=1)
    check_tokens("query_blocks", query_blocks, least=1)
    for one in densities:
        check_fraction("densities", one)
    # The row of the strategy itself is written last.
    missing = {name: one for name, one in strategies.items() if "recall" not in results.row(name)}
    if not missing:
        return {}
    steps = Steps(on_step, len(range(0, subject.layers, every)) + len(missing))
    views: dict[str, list[_View]] = {name: [] for name in missing}
    truths: list[_Truth] = []
    failures: Failures = {}

    def look(_: int, sight: LayerInputs) -> None:
        assert isinstance(sight.strategy, _Anyone)
        assert sight.strategy.layer is not None
        if sight.layer % every:
            return
        steps(f"layer {sight.layer}")
        by_size = {sight.prompt.block_size: _truth(sight, sight.prompt, query_blocks)}
        truths.append(by_size[sight.prompt.block_size])
        for name, strategy in missing.items():
            if name in failures:
                continue
            try:
                served = sparse_at_length(strategy, tokens.shape[1], subject.device)
                bound = served.for_layer(sight.strategy.layer)
                size = bound.block_size
                if size not in by_size:
                    by_size[size] = _truth(sight, replace(sight.prompt, block_size=size), query_blocks)
                views[name].append(_view(bound, strategy.tunable_option(), sight, by_size[size]))
            except (ValueError, RuntimeError) as error:
                failures[name] = str(error)

    with torch.inference_mode():
        size = mode(strategy.block_size for strategy in strategies.values())
        observe(subject, _Anyone(min_length=0, block_size=size), [tokens], look)
        results.content.setdefault("oracle", _oracle(truths))
        for name, strategy in missing.items():
            steps(name)
            if name in failures:
                continue
            points = []
            for options in (*_settings(strategy, views[name], densities), {}):
                point = _point(views[name], options)
                points.append(point)
                of_all = {} if options else {"needed": [found for x in TARGETS if (found := needed(points, x))]}
                layers = _layers(views[name])
                results.put(_row_name(name, options), {**_described(strategy, options), **point, **layers, **of_all})
            del views[name]  # its scores
    return failures


def needed(points: Sequence[Mapping[str, float]], target: float) -> dict[str, float]:
    """What a strategy computes for some recall, linearly interpolated between its settings.

    Args:
        points (Sequence[Mapping[str, float]]): "density", "recall" and "oracle_gap" of each setting.
        target (float): recall to reach.

    Returns:
        dict[str, float]: "target", and "recall", "density" and "oracle_gap" there. The recall is higher where the least
        setting reaches more; empty where none reaches the target.
    """
    below = None
    for point in sorted(points, key=lambda point: point["density"]):
        if point["recall"] >= target:
            way = 1.0 if below is None else (target - below["recall"]) / (point["recall"] - below["recall"])
            start = below or point
            parts = ("recall", "density", "oracle_gap")
            return {"target": target} | {n: round(start[n] + way * (point[n] - start[n]), DIGITS) for n in parts}
        below = point
    return {}


@dataclass(frozen=True, kw_only=True)
class _Anyone(Strategy):
    """Stands in a dense run for all strategies, and knows the layer that they are to be bound to."""

    name = "frontier"
    layer: Layer | None = None

    def for_layer(self, layer: Layer) -> Strategy:
        return replace(self, layer=layer)


@dataclass(frozen=True, eq=False)
class _Truth:
    """The attention of a layer in some query blocks, for one block size."""

    prompt: Prompt
    blocks: list[int]
    mass: Tensor  # fp64 [1, heads, blocks, n_k]; each row sums to exactly 1, so that means are shares of the whole


@dataclass(frozen=True, eq=False)
class _View:
    """What a strategy saw of a layer, without the queries and the keys."""

    layer: int
    truth: _Truth
    keep: Callable[[Mapping[str, Any]], Tensor]  # the table with these options
    dense: str | None = None  # why the layer runs dense


def _truth(sight: LayerInputs, prompt: Prompt, query_blocks: int) -> _Truth:
    blocks = spread_blocks(prompt.n_q, query_blocks)
    mass = true_mass(sight.q, sight.k, prompt, blocks).double()
    return _Truth(prompt, blocks, mass / mass.sum(-1, keepdim=True))


def _view(bound: Strategy, tunable: TunableOption | None, sight: LayerInputs, truth: _Truth) -> _View:
    dense = bound.dense_reason(truth.prompt, sight.q.device)
    if dense is not None:
        table = truth.prompt.visible(sight.q.device)
        return _View(sight.layer, truth, lambda options: table, dense)
    if tunable is None:
        table = bound.keep(sight.q, sight.k, truth.prompt)
        return _View(sight.layer, truth, lambda options: table)
    scores = bound.score(sight.q, sight.k, truth.prompt)
    like = sight.q.new_empty(()).expand(sight.q.shape)  # the shape and the device, without the memory

    def keep(options: Mapping[str, Any]) -> Tensor:
        strategy = replace(bound, **options)
        return strategy.guarded(strategy.select(scores, truth.prompt), like, truth.prompt)

    return _View(sight.layer, truth, keep)


def _settings(strategy: Strategy, views: Sequence[_View], densities: Sequence[float]) -> list[dict[str, Any]]:
    """Values of the tunable option near the densities, from the least on; none if the strategy has no such option."""
    tunable, views = strategy.tunable_option(), [view for view in views if view.dense is None]
    if tunable is None or not views:
        return []
    scale = {"tokens": views[0].truth.prompt.kv_len, "block_size": strategy.block_size}

    def options(step: int) -> dict[str, Any]:
        return tunable.options(tunable.value(step, **scale))

    def kept(step: int) -> float:
        return mean(float(density(view.keep(options(step)), view.truth.prompt).mean()) for view in views)

    return [options(step) for step in nearest_steps(kept, tunable.steps(**scale), densities)]


def nearest_steps(measure: Callable[[int], float], steps: int, targets: Sequence[float]) -> list[int]:
    """Steps whose measures are near some targets, by bisection.

    Args:
        measure (Callable[[int], float]): of a step in [0, steps); must not decrease.
        steps (int): how many there are, at least 1.
        targets (Sequence[float]): what to come near.

    Returns:
        list[int]: in ascending order, for each target a step within ``CLOSE`` of it, else the nearest that was tried;
        of those that lie within ``CLOSE`` of each other the first.
    """
    known: dict[int, float] = {}
    found = set()
    for target in targets:
        low, high, middle = 0, steps - 1, 0  # many strategies keep more than the target with their least
        while low <= high:
            if middle not in known:
                known[middle] = measure(middle)
            if abs(known[middle] - target) <= CLOSE:
                break
            low, high = (middle + 1, high) if known[middle] < target else (low, middle - 1)
            middle = (low + high) // 2
        found.add(min(known, key=lambda step: (abs(known[step] - target), step)))
    chosen: list[int] = []
    for step in sorted(found):
        if not chosen or known[step] - known[chosen[-1]] > CLOSE:
            chosen.append(step)
    return chosen


def _point(views: Sequence[_View], options: Mapping[str, Any]) -> dict[str, float]:
    """The measures of one setting: means over layers, and the worst of all recalls."""
    layers, recalls = [], []
    for view in views:
        keep, (prompt, blocks, mass) = view.keep(options), (view.truth.prompt, view.truth.blocks, view.truth.mass)
        recalls.append(recall(mass, keep, blocks))
        reached = float(recalls[-1].mean())
        layers.append(
            {
                "density": float(density(keep, prompt).mean()),
                "recall": reached,
                "oracle_density": oracle_density(mass, reached, prompt, blocks),
                "overlap": overlap(mass, keep, prompt, blocks),
                "measured_density": float(density(keep, prompt, blocks).mean()),
            }
        )
    means = {name: mean(layer[name] for layer in layers) for name in layers[0]}
    point = {
        "density": means["density"],
        "recall": means["recall"],
        "worst_recall": worst(torch.cat([one.flatten() for one in recalls])),
        "oracle_density": means["oracle_density"],
        "oracle_gap": means["measured_density"] / means["oracle_density"],
        "overlap": means["overlap"],
    }
    return {name: round(value, DIGITS) for name, value in point.items()}


def _layers(views: Sequence[_View]) -> dict[str, dict[str, list[int]]]:
    """Layers by why they ran dense, and by their sliding windows."""
    return {
        "dense_layers": layers_by({view.layer: view.dense for view in views}),
        "windows": layers_by({view.layer: view.truth.prompt.window for view in views}),
    }


def _oracle(truths: Sequence[_Truth]) -> dict[str, list[float]]:
    """The least density of all layers together at which they hold each share."""
    mass, (prompt, blocks) = torch.cat([one.mass for one in truths], dim=1), (truths[0].prompt, truths[0].blocks)
    densities = [round(oracle_density(mass, share, prompt, blocks), DIGITS) for share in SHARES]
    return {"recall": list(SHARES), "density": densities}


def _row_name(name: str, options: Mapping[str, Any]) -> str:
    """As strategies are written on a command line."""
    given = ",".join(f"{option}={value}" for option, value in options.items())
    return f"{name}{',' if ':' in name else ':'}{given}" if given else name


def _described(strategy: Strategy, options: Mapping[str, Any]) -> dict[str, Any]:
    """Label and options that aren't defaults; of files the names alone, since folders are another machine's."""
    default = to_config(get_strategy(strategy.name))
    given = to_config(replace(strategy, **options))
    told = {key: value for key, value in given.items() if value != default[key]}
    if isinstance(told.get("table"), str):
        told["table"] = Path(told["table"]).name
    return {"strategy": strategy.label, "options": told}

"""The least that each layer and group of heads has to keep for a target: a plan for one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from sparse_prefill import evaluation, registry
from sparse_prefill.calibration.bisection import first_step
from sparse_prefill.core.option_checks import check_fraction, check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.at_length import layers_by
from sparse_prefill.models.eval_model import EvalModel, LayerInputs
from sparse_prefill.models.observe import OnProgress, Texts, observe
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy, as_strategy
from sparse_prefill.tunable_option import TunableOption
from sparse_prefill.wrappers.by_head import ByHead

By = Literal["layer", "group", "head"]
LEVELS = 2**10  # of recall, of which a target density takes one


@dataclass(frozen=True)
class Fitted:
    """What some heads of a layer were given, and what they reach with it on the texts of the calibration.

    Args:
        layer (int): the layer.
        heads (tuple[int, ...]): its query heads.
        value (float): of the option.
        recall (float): attention mass that is kept, mean over heads, query blocks and texts.
        density (float): share of the visible blocks that is computed, likewise.
    """

    layer: int
    heads: tuple[int, ...]
    value: float
    recall: float
    density: float


@dataclass(frozen=True)
class Calibration:
    """A strategy with its option found for each layer and group of heads.

    Args:
        strategy (Strategy): what was calibrated.
        groups (tuple[Fitted, ...]): what was found, by layer and head.
        dense_layers (Mapping[str, Sequence[int]]): layers that run dense in use and have no group, by the reason, e.g.
            {"min_length": [0, 2]} for sliding windows under the strategy's ``min_length``. Default: none.
    """

    strategy: Strategy
    groups: tuple[Fitted, ...]
    dense_layers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def recall(self) -> float:
        """Mean over all layers and heads, on the texts of the calibration."""
        return self._mean([group.recall for group in self.groups])

    @property
    def density(self) -> float:
        """Mean over all layers and heads, on the texts of the calibration."""
        return self._mean([group.density for group in self.groups])

    @property
    def plan(self) -> Plan:
        """What was found, for either door, and to save. Layers that run dense get the strategy as it was given."""
        return as_plan(self.strategy, {(group.layer, group.heads): group.value for group in self.groups})

    def _mean(self, values: list[float]) -> float:
        heads = [len(group.heads) for group in self.groups]
        return sum(n * x for n, x in zip(heads, values, strict=True)) / sum(heads)


def calibrate(
    subject: EvalModel,
    strategy: Strategy | str,
    texts: Texts,
    *,
    recall: float | None = None,
    density: float | None = None,
    by: By | None = None,
    query_blocks: int = 16,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Find how much of a strategy's option each layer and group of heads needs for a target.

    Each text runs through the model once, densely, and is scored once in each layer. The option is then bisected over
    measured recall, with the selection alone repeated. Every group gets the least that reaches the recall. For a
    density, all groups get the same recall, the highest whose mean density stays within the target. So heads whose
    attention is spread are given more than others. Layers that run dense in use, such as sliding windows under the
    strategy's ``min_length``, have nothing to find: recall and density are those of all other layers.

    Args:
        subject (EvalModel): the model.
        strategy (Strategy | str): what to calibrate. It must have a tunable option; its other options stay.
        texts (Sequence): token ids of sample texts, each as long as the prompts to come.
        recall (float | None): share of the attention mass to keep, in (0, 1]. Default: none.
        density (float | None): share of the blocks to compute instead, on average over the layers that run sparse, in
            (0, 1].
        by (str | None): what gets a value of its own: a "layer", the "group" of query heads of a key head, or a "head".
            Default: "group", or "layer" for strategies that score the heads of a layer together.
        query_blocks (int): query blocks of each text to measure recall on. Default: 16.
        on_progress (Callable | None): called as ``on_progress(done, total)``. Default: nothing.

    Returns:
        Calibration: its ``plan`` is what the doors take.

    Raises:
        ValueError: if the strategy has no tunable option, not one target is given, a text or every layer runs dense,
            or the target is out of reach; the message names the layers and heads.

    Example:
        >>> found = calibrate(subject, "flex_prefill", [subject.encode(text)], recall=0.95)
        >>> found.plan.save("plan.yaml")
    """
    if (recall is None) == (density is None):
        raise ValueError(f"Give one target, recall or density, got recall={recall!r} and density={density!r}.")
    for name, target in (("recall", recall), ("density", density)):
        if target is not None:
            check_fraction(name, target)
    curves = measure(subject, strategy, texts, by=by, query_blocks=query_blocks, on_progress=on_progress)
    return curves.at_density(density) if density is not None else curves.at_recall(cast(float, recall))


def measure(
    subject: EvalModel,
    strategy: Strategy | str,
    texts: Texts,
    *,
    by: By | None = None,
    query_blocks: int = 16,
    on_progress: OnProgress | None = None,
) -> Curves:
    """What :func:`calibrate` looks at, for more than one target. Args and errors as there."""
    strategy = as_strategy(strategy)
    tunable = tunable_option_of(strategy)
    by = _by(by, strategy, tunable)
    check_tokens("query_blocks", query_blocks, least=1)
    curves: dict[tuple[int, tuple[int, ...]], Curve] = {}
    reasons: list[str | None] = [None] * subject.layers

    def look(index: int, sight: LayerInputs) -> None:
        if reason := sight.strategy.dense_reason(sight.prompt, subject.device):
            reasons[sight.layer] = reason
            return
        blocks = evaluation.spread_blocks(sight.prompt.n_q, query_blocks)
        mass = evaluation.true_mass(sight.q, sight.k, sight.prompt, blocks)
        group = sight.q.shape[1] // sight.k.shape[1]
        for heads in _split(by, sight.q.shape[1], group):
            own, keys = slice(heads[0], heads[-1] + 1), slice(heads[0] // group, heads[-1] // group + 1)
            q = sight.q[:, own]
            scores = sight.strategy.score(q, sight.k[:, keys], sight.prompt)
            seen = _Seen(scores, q.new_empty(()).expand(q.shape), sight.prompt, mass[:, own], blocks)
            curves.setdefault((sight.layer, heads), Curve(sight.strategy, sight.layer, heads)).seen.append(seen)

    with torch.inference_mode():
        observe(subject, strategy, texts, look, on_progress)
    if not curves:
        raise ValueError(
            f"{strategy.label} runs every layer of {subject.name} dense ({', '.join(sorted(set(map(str, reasons))))}), "
            "and there is nothing to calibrate: give longer texts or, where the layers have sliding windows, a lower "
            "min_length."
        )
    return Curves(strategy, by, list(curves.values()), layers_by(reasons))


@dataclass(frozen=True, eq=False)
class Curves:
    """What a strategy keeps in each layer and group of heads, by the value of its tunable option."""

    strategy: Strategy
    by: By
    curves: list[Curve]
    dense_layers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def at_recall(self, target: float) -> Calibration:
        """The least of each curve that reaches a recall; ValueError naming those that can't."""
        steps = [curve.first(target) for curve in self.curves]
        short = [curve for curve, step in zip(self.curves, steps, strict=True) if step is None]
        if short:
            where = [f"layer {c.layer} heads {_spoken(c.heads)} ({c.recall(c.steps - 1):.3f})" for c in short]
            more = f" and {len(where) - 4} more" if len(where) > 4 else ""
            option = tunable_option_of(self.strategy).option
            raise ValueError(
                f"{self.strategy.label} can't reach a recall of {target} by its {option} in "
                f"{', '.join(where[:4])}{more}: lower the target, or change its other options."
            )
        return self._at([step for step in steps if step is not None])

    def at_density(self, target: float) -> Calibration:
        """The highest recall, the same for all curves that can reach it, whose mean density is within a target."""
        known: dict[int, Calibration] = {}

        def density(level: int) -> float:
            steps = [curve.first(level / LEVELS) for curve in self.curves]
            known[level] = self._at([c.steps - 1 if s is None else s for c, s in zip(self.curves, steps, strict=True)])
            return known[level].density

        if density(0) > target:
            raise ValueError(
                f"{self.strategy.label} can't go down to a density of {target}: with the least "
                f"{tunable_option_of(self.strategy).option} it computes {known[0].density:.3f}. Raise the "
                "target, or lower its guards."
            )
        over = first_step(lambda level: float(density(level) > target), LEVELS + 1, 1.0)
        return known[LEVELS if over is None else over - 1]

    def at_values(self, values: Mapping[tuple[int, tuple[int, ...]], float]) -> Calibration:
        """What other values than those of a calibration keep, by layer and query heads."""
        found = [
            Fitted(curve.layer, curve.heads, value, *curve.measure(value))
            for curve in self.curves
            for value in [values[curve.layer, curve.heads]]
        ]
        return Calibration(self.strategy, tuple(found), self.dense_layers)

    def _at(self, steps: Sequence[int]) -> Calibration:
        found = [
            Fitted(curve.layer, curve.heads, curve.value(step), curve.recall(step), curve.density(step))
            for curve, step in zip(self.curves, steps, strict=True)
        ]
        return Calibration(self.strategy, tuple(found), self.dense_layers)


@dataclass(frozen=True, eq=False)
class Curve:
    """What some heads of a layer keep at each step of the tunable option; each step is measured once.

    Args:
        strategy (Strategy): bound to the layer.
        layer (int): the layer.
        heads (tuple[int, ...]): its query heads.
        seen (list): what they saw of each text.
    """

    strategy: Strategy
    layer: int
    heads: tuple[int, ...]
    seen: list[_Seen] = field(default_factory=list)
    _known: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many values there are."""
        return tunable_option_of(self.strategy).steps(**self._scale)

    def value(self, step: int) -> float:
        """The value of a step."""
        return tunable_option_of(self.strategy).value(step, **self._scale)

    def recall(self, step: int) -> float:
        """Recall at a step, mean over heads, query blocks and texts."""
        return self._measured(step)[0]

    def density(self, step: int) -> float:
        """Density at a step, mean over heads and texts."""
        return self._measured(step)[1]

    def first(self, target: float) -> int | None:
        """The first step that reaches a recall, None if none does."""
        return first_step(self.recall, self.steps, target)

    def measure(self, value: float) -> tuple[float, float]:
        """Recall and density at any value."""
        strategy = replace(self.strategy, **tunable_option_of(self.strategy).options(value))
        found = [one.kept(strategy) for one in self.seen]
        recall, density = (sum(values) / len(found) for values in zip(*found, strict=True))
        return recall, density

    def _measured(self, step: int) -> tuple[float, float]:
        if step not in self._known:
            self._known[step] = self.measure(self.value(step))
        return self._known[step]

    @property
    def _scale(self) -> dict[str, int]:
        return {"tokens": max(one.prompt.kv_len for one in self.seen), "block_size": self.strategy.block_size}


@dataclass(frozen=True, eq=False)
class _Seen:
    """One text, as some heads of a layer saw it."""

    scores: Any
    like: Tensor  # of the shape and on the device of the queries, without their memory
    prompt: Prompt
    mass: Tensor  # [1, heads, blocks, n_k]
    blocks: list[int]

    def kept(self, strategy: Strategy) -> tuple[float, float]:
        keep = strategy.guarded(strategy.select(self.scores, self.prompt), self.like, self.prompt)
        recall = evaluation.recall(self.mass, keep, self.blocks)
        return float(recall.mean()), float(evaluation.density(keep, self.prompt).mean())


def as_plan(strategy: Strategy, values: Mapping[tuple[int, tuple[int, ...]], float]) -> Plan:
    """A plan that gives heads of layers values of a strategy's tunable option.

    Args:
        strategy (Strategy): what serves all layers.
        values (Mapping[tuple[int, tuple[int, ...]], float]): values by layer and query heads, of all heads of a layer.
            Layers without values get the strategy itself.

    Returns:
        Plan: of the strategy itself, where a layer has one value or the option takes one for each head, else by head.
    """
    tunable = tunable_option_of(strategy)
    layers: dict[int, dict[int, float]] = {}
    for (layer, heads), value in values.items():
        layers.setdefault(layer, {}).update(dict.fromkeys(heads, value))
    of_layers = {index: _of_layer(strategy, tunable, heads) for index, heads in layers.items()}
    return Plan(default=strategy, layers=of_layers)


def _of_layer(strategy: Strategy, tunable: TunableOption, values: Mapping[int, float]) -> Strategy:
    """One strategy with a value for each query head."""
    common, _ = Counter(values.values()).most_common(1)[0]
    of = replace(strategy, **tunable.options(common))
    if len(set(values.values())) == 1:
        return of
    if tunable.per_head:
        return replace(strategy, **tunable.options(tuple(values[head] for head in sorted(values))))
    heads = {head: replace(strategy, **tunable.options(x)) for head, x in sorted(values.items()) if x != common}
    return ByHead(of=of, heads=heads)


def tunable_option_of(strategy: Strategy) -> TunableOption:
    """The tunable option of a strategy; ValueError with the names of the strategies that have one, if it has none."""
    option = strategy.tunable_option()
    if option is None:
        raise ValueError(
            f"{strategy.label} with these options has no tunable option, so there is nothing to calibrate. Strategies "
            f"with one: {', '.join(tunable_options())}. Calibrate the strategy first, then wrap it."
        )
    return option


def tunable_options() -> dict[str, TunableOption]:
    """The tunable option of each strategy that has one, by the strategy's name."""
    names = registry.strategies.names()
    found = {name: getattr(registry.strategies.factory(name), "tunable", None) for name in names}
    return {name: option for name, option in found.items() if option is not None}


def _by(by: By | None, strategy: Strategy, tunable: TunableOption) -> By:
    if by is None:
        return "layer" if tunable.whole_layer else "group"
    if by not in get_args(By):
        raise ValueError(f"by must be one of {', '.join(get_args(By))}, got {by!r}.")
    if tunable.whole_layer and by != "layer":
        raise ValueError(f'{strategy.label} scores the heads of a layer together: take by="layer", got {by!r}.')
    return by


def _split(by: By, heads: int, group: int) -> list[tuple[int, ...]]:
    """Query heads that share a value."""
    size = {"layer": heads, "group": group, "head": 1}[by]
    return [tuple(range(first, first + size)) for first in range(0, heads, size)]


def _spoken(heads: tuple[int, ...]) -> str:
    return str(heads[0]) if len(heads) == 1 else f"{heads[0]}-{heads[-1]}"

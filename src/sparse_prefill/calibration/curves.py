"""Recall and density of each layer and group of heads, by the value of a strategy's tunable option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparse_prefill import evaluation
from sparse_prefill.calibration.bisection import first_step
from sparse_prefill.calibration.result import Calibration, Fitted
from sparse_prefill.calibration.tunable import tunable_option_of
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.at_length import layers_by
from sparse_prefill.models.eval_model import EvalModel, LayerInputs
from sparse_prefill.models.observe import OnProgress, Texts, observe
from sparse_prefill.strategy import Strategy, as_strategy
from sparse_prefill.tunable_option import TunableOption

By = Literal["layer", "group", "head"]
RECALL_STEPS = 2**10  # steps of recall that the search for a density bisects over


def measure(
    subject: EvalModel,
    strategy: Strategy | str,
    texts: Texts,
    *,
    by: By | None = None,
    query_blocks: int = 16,
    on_progress: OnProgress | None = None,
) -> Curves:
    """Measure the curves that :func:`calibrate` searches, to use them for several targets. Args and errors as there."""
    strategy = as_strategy(strategy)
    by = _granularity(by, strategy, tunable_option_of(strategy))
    check_tokens("query_blocks", query_blocks, least=1)
    curves: dict[tuple[int, tuple[int, ...]], Curve] = {}
    reasons: list[str | None] = [None] * subject.layers

    def look(text: int, inputs: LayerInputs) -> None:
        if reason := inputs.strategy.dense_reason(inputs.prompt, subject.device):
            reasons[inputs.layer] = reason
            return
        blocks = evaluation.spread_blocks(inputs.prompt.n_q, query_blocks)
        mass = evaluation.true_mass(inputs.q, inputs.k, inputs.prompt, blocks)
        group = inputs.q.shape[1] // inputs.k.shape[1]
        for heads in _groups(by, inputs.q.shape[1], group):
            own, keys = slice(heads[0], heads[-1] + 1), slice(heads[0] // group, heads[-1] // group + 1)
            q = inputs.q[:, own]
            scores = inputs.strategy.score(q, inputs.k[:, keys], inputs.prompt)
            scored = _ScoredText(scores, q.new_empty(()).expand(q.shape), inputs.prompt, mass[:, own], blocks)
            curve = curves.setdefault((inputs.layer, heads), Curve(inputs.strategy, inputs.layer, heads))
            curve.texts.append(scored)

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
    """The curves of all layers and groups of heads, with the searches for one target over all of them.

    Args:
        strategy (Strategy): the measured strategy.
        by (str): which heads share a value: those of a "layer", of a "group", or each "head" for itself.
        curves (list[Curve]): a curve for each layer and group of heads.
        dense_layers (Mapping[str, Sequence[int]]): as for :class:`Calibration`.
    """

    strategy: Strategy
    by: By
    curves: list[Curve]
    dense_layers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def at_recall(self, target: float) -> Calibration:
        """The smallest density of each curve that reaches a recall; ValueError, naming them, if some can't reach it."""
        steps = [curve.first(target) for curve in self.curves]
        short = [curve for curve, step in zip(self.curves, steps, strict=True) if step is None]
        if short:
            where = [f"layer {c.layer} heads {_head_range(c.heads)} ({c.recall(c.steps - 1):.3f})" for c in short]
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

        def density(recall_step: int) -> float:
            steps = [curve.first(recall_step / RECALL_STEPS) for curve in self.curves]
            reached = [c.steps - 1 if s is None else s for c, s in zip(self.curves, steps, strict=True)]
            known[recall_step] = self._at(reached)
            return known[recall_step].density

        if density(0) > target:
            raise ValueError(
                f"{self.strategy.label} can't go down to a density of {target}: with the least "
                f"{tunable_option_of(self.strategy).option} it computes {known[0].density:.3f}. Raise the "
                "target, or lower its guards."
            )
        over = first_step(lambda step: float(density(step) > target), RECALL_STEPS + 1, 1.0)
        return known[RECALL_STEPS if over is None else over - 1]

    def at_values(self, values: Mapping[tuple[int, tuple[int, ...]], float]) -> Calibration:
        """Recall and density at given values, by layer and query heads."""
        groups = [
            Fitted(curve.layer, curve.heads, value, *curve.measure(value))
            for curve in self.curves
            for value in [values[curve.layer, curve.heads]]
        ]
        return Calibration(self.strategy, tuple(groups), self.dense_layers)

    def _at(self, steps: Sequence[int]) -> Calibration:
        groups = [
            Fitted(curve.layer, curve.heads, curve.value(step), curve.recall(step), curve.density(step))
            for curve, step in zip(self.curves, steps, strict=True)
        ]
        return Calibration(self.strategy, tuple(groups), self.dense_layers)


@dataclass(frozen=True, eq=False)
class Curve:
    """Recall and density of some heads of a layer at each step of the tunable option; each step is measured once.

    Args:
        strategy (Strategy): the strategy, bound to the layer.
        layer (int): index of the layer.
        heads (tuple[int, ...]): its query heads.
        texts (list): the heads' scores and true attention on each text.
    """

    strategy: Strategy
    layer: int
    heads: tuple[int, ...]
    texts: list[_ScoredText] = field(default_factory=list)
    _known: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Number of steps of the option."""
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
        found = [text.recall_and_density(strategy) for text in self.texts]
        recall, density = (sum(values) / len(found) for values in zip(*found, strict=True))
        return recall, density

    def _measured(self, step: int) -> tuple[float, float]:
        if step not in self._known:
            self._known[step] = self.measure(self.value(step))
        return self._known[step]

    @property
    def _scale(self) -> dict[str, int]:
        return {"tokens": max(text.prompt.kv_len for text in self.texts), "block_size": self.strategy.block_size}


@dataclass(frozen=True, eq=False)
class _ScoredText:
    """Scores and true attention of some heads of a layer on one text."""

    scores: Any
    like: Tensor  # has the shape and the device of the queries, without their memory
    prompt: Prompt
    mass: Tensor  # [1, heads, blocks, n_k]
    blocks: list[int]

    def recall_and_density(self, strategy: Strategy) -> tuple[float, float]:
        keep = strategy.guarded(strategy.select(self.scores, self.prompt), self.like, self.prompt)
        recall = evaluation.recall(self.mass, keep, self.blocks)
        return float(recall.mean()), float(evaluation.density(keep, self.prompt).mean())


def _granularity(by: By | None, strategy: Strategy, tunable: TunableOption) -> By:
    if by is None:
        return "layer" if tunable.whole_layer else "group"
    if by not in get_args(By):
        raise ValueError(f"by must be one of {', '.join(get_args(By))}, got {by!r}.")
    if tunable.whole_layer and by != "layer":
        raise ValueError(f'{strategy.label} scores the heads of a layer together: take by="layer", got {by!r}.')
    return by


def _groups(by: By, heads: int, group: int) -> list[tuple[int, ...]]:
    """Query heads that share a value."""
    size = {"layer": heads, "group": group, "head": 1}[by]
    return [tuple(range(first, first + size)) for first in range(0, heads, size)]


def _head_range(heads: tuple[int, ...]) -> str:
    return str(heads[0]) if len(heads) == 1 else f"{heads[0]}-{heads[-1]}"

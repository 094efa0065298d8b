"""The result of a calibration: a value for each layer and group of heads, and the plan with these values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sparse_prefill.calibration.tunable import tunable_option_of
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption
from sparse_prefill.wrappers.by_head import ByHead


@dataclass(frozen=True)
class Fitted:
    """The value that some heads of a layer got, with their recall and density on the calibration texts.

    Args:
        layer (int): index of the layer.
        heads (tuple[int, ...]): its query heads.
        value (float): value of the tunable option.
        recall (float): share of the attention mass in kept blocks, mean over heads, query blocks and texts.
        density (float): share of the visible blocks that is computed, mean over heads and texts.
    """

    layer: int
    heads: tuple[int, ...]
    value: float
    recall: float
    density: float


@dataclass(frozen=True)
class Calibration:
    """A strategy with its tunable option fitted for each layer and group of heads.

    Args:
        strategy (Strategy): the calibrated strategy.
        groups (tuple[Fitted, ...]): the fitted values, by layer and heads.
        dense_layers (Mapping[str, Sequence[int]]): layers that run dense in use and have no group, by the reason, e.g.
            {"min_length": [0, 2]} for sliding windows under the strategy's ``min_length``. Default: none.
    """

    strategy: Strategy
    groups: tuple[Fitted, ...]
    dense_layers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def recall(self) -> float:
        """Mean over all fitted layers and heads, on the calibration texts."""
        return self._mean([group.recall for group in self.groups])

    @property
    def density(self) -> float:
        """Mean over all fitted layers and heads, on the calibration texts."""
        return self._mean([group.density for group in self.groups])

    @property
    def plan(self) -> Plan:
        """The plan to save or to serve. Layers that run dense get the strategy with its own options."""
        return as_plan(self.strategy, {(group.layer, group.heads): group.value for group in self.groups})

    def _mean(self, values: list[float]) -> float:
        heads = [len(group.heads) for group in self.groups]
        return sum(n * x for n, x in zip(heads, values, strict=True)) / sum(heads)


def as_plan(strategy: Strategy, values: Mapping[tuple[int, tuple[int, ...]], float]) -> Plan:
    """A plan that sets a strategy's tunable option by layer and heads.

    Args:
        strategy (Strategy): the strategy of all layers.
        values (Mapping[tuple[int, tuple[int, ...]], float]): values by layer and query heads, for all heads of a layer.
            Layers without values get the strategy with its own options.

    Returns:
        Plan: layers use the strategy itself if they have one value or the option takes a value for each head, else
        :class:`~sparse_prefill.wrappers.by_head.ByHead`.
    """
    tunable = tunable_option_of(strategy)
    by_layer: dict[int, dict[int, float]] = {}
    for (layer, heads), value in values.items():
        by_layer.setdefault(layer, {}).update(dict.fromkeys(heads, value))
    layers = {index: _with_values(strategy, tunable, by_head) for index, by_head in by_layer.items()}
    return Plan(default=strategy, layers=layers)


def _with_values(strategy: Strategy, tunable: TunableOption, by_head: Mapping[int, float]) -> Strategy:
    """One strategy with a value for each query head."""
    common, _ = Counter(by_head.values()).most_common(1)[0]
    of = replace(strategy, **tunable.options(common))
    if len(set(by_head.values())) == 1:
        return of
    if tunable.per_head:
        return replace(strategy, **tunable.options(tuple(by_head[head] for head in sorted(by_head))))
    heads = {head: replace(strategy, **tunable.options(x)) for head, x in sorted(by_head.items()) if x != common}
    return ByHead(of=of, heads=heads)

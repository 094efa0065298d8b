"""Layers of a dense run, scored once by a strategy, so that each of its settings only costs a selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.true_mass import true_mass
from sparse_prefill.evaluation.blocks import density, oracle_density, overlap, recall, spread_blocks, worst
from sparse_prefill.evaluation.settings import DIGITS
from sparse_prefill.models.at_length import layers_by
from sparse_prefill.models.eval_model import LayerInputs
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@dataclass(frozen=True, eq=False)
class TrueAttention:
    """The attention of a layer in some query blocks, for one block size."""

    prompt: Prompt
    blocks: list[int]
    mass: Tensor  # fp64 [1, heads, blocks, n_k]; each row sums to exactly 1, so that means are shares of the whole

    @classmethod
    def of(cls, inputs: LayerInputs, prompt: Prompt, query_blocks: int) -> TrueAttention:
        blocks = spread_blocks(prompt.n_q, query_blocks)
        mass = true_mass(inputs.q, inputs.k, prompt, blocks).double()
        return cls(prompt, blocks, mass / mass.sum(-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class ScoredLayer:
    """A layer as a strategy scored it, without the queries and the keys."""

    layer: int
    truth: TrueAttention
    keep: Callable[[Mapping[str, Any]], Tensor]  # the keep table with these options
    dense: str | None = None  # why the layer runs dense

    @classmethod
    def of(
        cls, strategy: Strategy, tunable: TunableOption | None, inputs: LayerInputs, truth: TrueAttention
    ) -> ScoredLayer:
        """Score a layer with a strategy that is bound to it."""
        dense = strategy.dense_reason(truth.prompt, inputs.q.device)
        if dense is not None:
            table = truth.prompt.visible(inputs.q.device)
            return cls(inputs.layer, truth, lambda options: table, dense)
        if tunable is None:
            table = strategy.keep(inputs.q, inputs.k, truth.prompt)
            return cls(inputs.layer, truth, lambda options: table)
        scores = strategy.score(inputs.q, inputs.k, truth.prompt)
        like = inputs.q.new_empty(()).expand(inputs.q.shape)  # the shape and the device, without the memory

        def keep(options: Mapping[str, Any]) -> Tensor:
            chosen = replace(strategy, **options)
            return chosen.guarded(chosen.select(scores, truth.prompt), like, truth.prompt)

        return cls(inputs.layer, truth, keep)


def mean_density(layers: Sequence[ScoredLayer], options: Mapping[str, Any]) -> float:
    """Density of one setting, mean over layers and heads."""
    return mean(float(density(layer.keep(options), layer.truth.prompt).mean()) for layer in layers)


def measures(layers: Sequence[ScoredLayer], options: Mapping[str, Any]) -> dict[str, float]:
    """The measures of one setting: means over layers, and the worst of all recalls."""
    by_layer, recalls = [], []
    for layer in layers:
        keep = layer.keep(options)
        prompt, blocks, mass = layer.truth.prompt, layer.truth.blocks, layer.truth.mass
        recalls.append(recall(mass, keep, blocks))
        reached = float(recalls[-1].mean())
        by_layer.append(
            {
                "density": float(density(keep, prompt).mean()),
                "recall": reached,
                "oracle_density": oracle_density(mass, reached, prompt, blocks),
                "overlap": overlap(mass, keep, prompt, blocks),
                "measured_density": float(density(keep, prompt, blocks).mean()),
            }
        )
    means = {name: mean(layer[name] for layer in by_layer) for name in by_layer[0]}
    point = {
        "density": means["density"],
        "recall": means["recall"],
        "worst_recall": worst(torch.cat([one.flatten() for one in recalls])),
        "oracle_density": means["oracle_density"],
        "oracle_gap": means["measured_density"] / means["oracle_density"],
        "overlap": means["overlap"],
    }
    return {name: round(value, DIGITS) for name, value in point.items()}


def dense_layers_and_windows(layers: Sequence[ScoredLayer]) -> dict[str, dict[str, list[int]]]:
    """Layers by the reason why they ran dense, and by the tokens of their sliding windows."""
    return {
        "dense_layers": layers_by({layer.layer: layer.dense for layer in layers}),
        "windows": layers_by({layer.layer: layer.truth.prompt.window for layer in layers}),
    }


def oracle_curve(truths: Sequence[TrueAttention], shares: Sequence[float]) -> dict[str, list[float]]:
    """The smallest density of all layers together for each recall."""
    mass, (prompt, blocks) = torch.cat([one.mass for one in truths], dim=1), (truths[0].prompt, truths[0].blocks)
    densities = [round(oracle_density(mass, share, prompt, blocks), DIGITS) for share in shares]
    return {"recall": list(shares), "density": densities}

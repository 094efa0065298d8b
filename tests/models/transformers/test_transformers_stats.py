"""The layer that strategies receive, and statistics."""

from __future__ import annotations

import pytest
import torch

import sparse_prefill as sp
from sparse_prefill.models.transformers import sparse
from sparse_prefill.models.transformers.stats import Stats
from tests.models.transformers.small_models import BLOCK, PADDED, SHAPE, WINDOW, build, generate, logits


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("Llama", {}, [("half_split", 8), ("half_split", 8)]),
        ("SmolLM3", {}, [("half_split", 8), None]),
        ("Gemma3Text", {}, [("half_split", 8), ("half_split", 8)]),
        ("GptOss", {}, [("half_split", 8), ("half_split", 8)]),
        ("Glm4", {"head_dim": 16}, [("interleaved", 4), ("interleaved", 4)]),
        ("Cohere", {}, [("interleaved", 8), ("interleaved", 8)]),
        ("Cohere2", {"sliding_window": WINDOW}, [None, None]),
    ],
)
def test_strategies_receive_the_rotary_embedding_if_it_can_be_determined(family, options, expected):
    layers = []

    class LayerRecorder(sp.Strategy):
        def for_layer(self, layer):
            layers.append(layer)
            return self

    with sparse(build(family, **options), LayerRecorder(block_size=BLOCK)):
        pass
    assert [(layer.index, layer.count) for layer in layers] == [(0, 2), (1, 2)]
    ropes = [None if layer.rope is None else (layer.rope.layout, len(layer.rope.frequencies)) for layer in layers]
    assert ropes == expected


def test_statistics_cover_each_layer_and_head():
    model = build()
    plan = sp.Plan(default=SHAPE, layers={1: sp.get_strategy("a_shape", block_size=BLOCK, min_length=500)})
    with sparse(model, plan) as stats, sp.record() as calls:
        generate(model, PADDED)
    assert [call.dense for call in calls] == [None, None, "min_length", "min_length"]
    data = stats.to_dict()
    first, second = data["layers"]
    assert (first["layer"], first["strategy"], first["calls"], first["dense"]) == (0, "a_shape", 2, {})
    assert (second["layer"], second["calls"], second["dense"]) == (1, 2, {"min_length": 2})
    assert second["density"] == [1.0] * 4
    assert len(first["density"]) == 4
    assert all(0 < density < 0.9 for density in first["density"])
    assert first["seconds"].keys() == {"estimate", "select", "table", "kernel"}
    assert data["density"] == pytest.approx((first["density"][0] + 1) / 2)
    lines = str(stats).splitlines()
    assert lines[0].split() == ["layer", "strategy", "calls", "dense", "density", "heads", "seconds"]
    assert "2 min_length" in lines[2]


def test_density_weights_calls_by_their_token_pairs():
    stats = Stats()
    stats.add(0, 2, [sp.Call("a", 3, 3, density=torch.tensor([[0.5, 1.0]])), sp.Call("a", 1, 2)])
    assert stats.layers[0].density.tolist() == [pytest.approx((6 * 0.5 + 2) / 8), 1.0]


def test_with_statistics_turned_off_no_calls_are_gathered():
    model = build()
    with sparse(model, SHAPE, stats=False) as stats, sp.record() as calls:
        logits(model)
    assert len(calls) == 2
    assert stats.to_dict() == {"density": 1.0, "layers": []}

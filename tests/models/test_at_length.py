"""Short prompts run sparse, and sliding windows run as in use."""

from __future__ import annotations

import pytest
import torch

import sparse_prefill as sp
from sparse_prefill.models.at_length import LayersRun, layers_by, sparse_at_length, too_short
from sparse_prefill.strategy import to_config

WINDOWED = sp.Prompt(q_len=3000, window=1000)


@pytest.mark.parametrize(
    ("strategy", "whole_reason", "window_reason"),
    [
        (sp.get_strategy("a_shape"), None, "min_length"),
        (sp.get_strategy("a_shape", min_length=900), None, None),
        (sp.get_strategy("a_shape", min_length=8000), None, "min_length"),
        (sp.get_strategy("oracle"), None, "min_length"),  # dense by default up to 8192 tokens
        (sp.get_strategy("delta", of="a_shape"), None, "min_length"),
        (sp.get_strategy("dense"), "strategy", "strategy"),
    ],
    ids=lambda value: value.label if isinstance(value, sp.Strategy) else "",
)
def test_windows_run_as_in_use_and_whole_prompts_sparse(strategy, whole_reason, window_reason):
    found = sparse_at_length(strategy, 3000)
    assert found.dense_reason(sp.Prompt(q_len=3000)) == whole_reason
    assert found.dense_reason(WINDOWED) == window_reason
    assert strategy.dense_reason(WINDOWED) == window_reason, "in use"


def test_plans_and_wrapped_strategies_keep_all_other_options():
    wrapped = sp.get_strategy("by_head", of=sp.get_strategy("oracle", share=0.5), heads={1: "a_shape"})
    plan = sp.Plan(default=wrapped, layers={1: sp.get_strategy("a_shape", min_length=7)})
    found = sparse_at_length(plan, 3000)
    expected = to_config(wrapped)
    expected["of"]["min_length"] = 3000
    expected["heads"][1]["min_length"] = 2048
    assert to_config(found.default) == expected
    assert found.layers == {1: sp.get_strategy("a_shape", min_length=7)}


def test_the_default_min_length_depends_on_the_device():
    assert sparse_at_length(sp.get_strategy("a_shape"), 10**6).min_length == 2048
    assert sparse_at_length(sp.get_strategy("a_shape"), 10**6, "cuda").min_length == 16384


def test_layers_that_ran_dense_are_recorded_with_their_reasons():
    q, k, v = torch.randn(1, 4, 300, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    shape = sp.get_strategy("a_shape", block_size=16, min_length=200)
    layers = LayersRun()
    with sp.record(inspect=layers):
        sp.sparse_attention(q, k, v, shape)
        sp.sparse_attention(q, k, v, shape, prompt=sp.Prompt(q_len=300, block_size=16, window=64))
        sp.sparse_attention(q, k, v, "dense")
    assert layers.reasons == [None, "min_length", "strategy"]
    assert layers.windows == [None, 64, None]
    assert layers_by(layers.reasons) == {"min_length": [1], "strategy": [2]}
    assert layers_by(layers.windows) == {"64": [1]}
    assert too_short(layers.reasons, layers.windows) == []
    assert too_short(["min_length", "strategy"], [None, None]) == ["min_length"]

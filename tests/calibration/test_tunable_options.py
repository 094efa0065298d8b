"""Tunable options: the properties that calibration needs, for every strategy that has one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.calibration import tunable_option_of
from sparse_prefill.calibration.bisection import first_step
from sparse_prefill.tunable_option import TunableOption

TUNABLE = [name for name in sp.list_strategies() if registry.strategies.factory(name).tunable is not None]
SIZE = {"tokens": 150, "block_size": 16}


def test_most_strategies_have_a_tunable_option():
    assert {"flex_prefill", "xattention", "flash_prefill", "mean_pool", "prism", "minference"} <= set(TUNABLE)
    assert not {"dense", "duo_attention", "lserve", "triangle_mix"} & set(TUNABLE)


@pytest.mark.parametrize("name", TUNABLE)
def test_a_higher_step_keeps_all_blocks_of_lower_steps(name):
    q, k, _ = reference.random_qkv(q_len=150, scale=3)
    free = {"sink": 0, "local": 0, "last": 0, **({"similarity": -1.0} if name == "sparge_attention" else {})}
    strategy = sp.get_strategy(name, block_size=16, **free)  # no block is always kept
    tunable, prompt = strategy.tunable_option(), sp.Prompt(q_len=150, block_size=16)
    scores = strategy.score(q, k, prompt)
    steps = sorted({round(i * (tunable.steps(**SIZE) - 1) / 24) for i in range(25)})
    densities, before = [], torch.zeros(1, dtype=torch.bool)
    for step in steps:
        stepped = replace(strategy, **tunable.options(tunable.value(step, **SIZE)))
        keep = stepped.keep(q, k, prompt)
        assert torch.equal(keep, stepped.guarded(stepped.select(scores, prompt), q, prompt)), (
            "scores depend on the tunable option"
        )
        assert not (before & ~keep).any(), f"a step to {tunable.value(step, **SIZE)} drops blocks"
        densities.append(float(keep.expand(1, 6, -1, -1).sum()))
        before = keep
    assert densities[0] < densities[-1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flex_prefill", {"official": True}),
        ("last_query", {"budget": 64}),
        ("sparge_attention", {"topk": 0.5}),
        ("seer_attention", {"ratio": 0.5}),
        ("moba", {"gate": "token"}),
        ("minference", {"heads": {0: ["stream_llm", 100, 800]}}),
        ("dense", {}),
        ("duo_attention", {}),
        ("delta", {"of": "flex_prefill"}),
    ],
)
def test_strategies_without_a_tunable_option_are_refused_with_a_list_of_those_with_one(name, options):
    with pytest.raises(ValueError, match=rf"^{name}.* no tunable option.*flash_prefill, flex_prefill"):
        tunable_option_of(sp.get_strategy(name, **options))


def test_values_go_from_the_lowest_to_the_highest_density():
    linear, log = TunableOption("share", 0.01, 1.0), TunableOption("alpha", 1.0, 1e-12, scale="log")
    last = linear.steps(**SIZE) - 1
    assert (linear.value(0, **SIZE), linear.value(last, **SIZE)) == (0.01, 1.0)
    assert (log.value(0, **SIZE), log.value(last, **SIZE)) == (1.0, 1e-12)
    assert log.value(last // 2, **SIZE) == pytest.approx(1e-6, rel=2e-3)
    tokens = TunableOption("local", 1, scale="tokens", also=("slash",))
    assert [tokens.value(step, **SIZE) for step in range(tokens.steps(**SIZE))] == [1, *range(16, 145, 16), 150]
    assert tokens.options(7) == {"local": 7, "slash": 7}
    blocks = TunableOption("k", 1, scale="blocks")
    assert [blocks.value(step, **SIZE) for step in range(blocks.steps(**SIZE))] == list(range(1, 11))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.integers(0, 22))
def test_bisection_finds_the_same_step_as_a_linear_search(values, target):
    values = sorted(values)
    measured: list[int] = []

    def measure(step: int) -> float:
        measured.append(step)
        return values[step]

    expected = next((step for step, value in enumerate(values) if value >= target), None)
    assert first_step(measure, len(values), target) == expected
    assert len(measured) <= 2 + len(values).bit_length()

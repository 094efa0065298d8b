"""Strategies run sparse from the length at which they were measured to be faster than dense attention."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import sparse_prefill as sp
from sparse_prefill import registry

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from crossover import first_faster  # benchmarks are scripts, not a package

MEASURED = Path(__file__).parents[2] / "benchmarks/results/crossover_cpu_smollm2.json"
BEYOND = 8192  # for strategies that were faster at none of the measured lengths
LEAST = 2048  # for shorter prompts, a few percent of time don't justify skipping blocks


def test_every_strategy_was_measured():
    assert sorted(["dense", *json.loads(MEASURED.read_text())["strategies"]]) == sp.list_strategies()


@pytest.mark.parametrize("name", [name for name in sp.list_strategies() if name != "dense"])
def test_the_crossover_of_a_strategy_equals_the_measured_one(name):
    report = json.loads(MEASURED.read_text())
    assert max(report["lengths"]) < BEYOND
    measured = report["strategies"][name]["crossover"] or BEYOND
    assert registry.strategies.factory(name).crossover == max(LEAST, measured)


@pytest.mark.parametrize(
    ("speedup", "length"),
    [([1.2, 1.1, 1.3], 1024), ([0.9, 1.1, 1.3], 2048), ([1.2, 1.005, 1.3], 3072), ([1.2, 1.3, 1.005], None)],
)
def test_differences_within_noise_do_not_count_as_faster(speedup, length):
    assert first_faster([1024, 2048, 3072], speedup) == length


def test_crossovers_follow_from_the_measured_speed_ups():
    report = json.loads(MEASURED.read_text())
    for row in report["strategies"].values():
        assert row["crossover"] == first_faster(report["lengths"], row["speedup"])

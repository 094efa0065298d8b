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


def measured() -> dict:
    report = json.loads(MEASURED.read_text())
    assert max(report["lengths"]) < BEYOND
    return report["strategies"]


def test_every_measured_strategy_is_registered():
    assert set(measured()) <= set(sp.list_strategies()) - {"dense"}


@pytest.mark.parametrize("name", [name for name in sp.list_strategies() if name != "dense"])
def test_the_crossover_is_the_measured_one_or_the_default(name):
    row = measured().get(name)  # benchmarks/crossover.py adds the row of a new strategy
    expected = sp.Strategy.crossover if row is None else max(LEAST, row["crossover"] or BEYOND)
    assert registry.strategies.factory(name).crossover == expected


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

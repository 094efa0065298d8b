"""benchmarks/synthetic_heads.py: the settings that it finds reach the recall and hardly exceed it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import sparse_prefill as sp
from sparse_prefill.estimators.true_mass import true_mass
from sparse_prefill.evaluation.blocks import density, recall, spread_blocks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import known_heads
import synthetic_heads

SMALL = ["--lengths", "4096", "--heads", "5", "1", "128"]


def test_found_settings_reach_the_recall(tmp_path):
    path = tmp_path / "report.json"
    report = synthetic_heads.main([*SMALL, "--strategies", "mean_slash", "mean_pool:sink=256", "--json", str(path)])
    assert json.loads(path.read_text()) == report
    assert report["text"] == "synthetic heads"
    q, k, _ = known_heads.structured(4096, 5, 1, 128, dtype=torch.float32, device="cpu")
    prompt = sp.Prompt(4096)
    blocks = spread_blocks(prompt.n_q, synthetic_heads.QUERY_BLOCKS)
    mass = true_mass(q, k, prompt, blocks)
    for row, (name, given) in zip(
        report["results"][0]["rows"], {"mean_slash": {}, "mean_pool": {"sink": 256}}.items(), strict=True
    ):
        for setting, options in (("as it stands", {}), ("at the recall", row["at the recall"]["options"])):
            keep = sp.get_strategy(name, **given, **options).keep(q, k)
            assert row[setting]["density"] == pytest.approx(float(density(keep, prompt, blocks).mean()))
            assert row[setting]["recall"] == pytest.approx(float(recall(mass, keep, blocks).mean()))
        assert 0.95 <= row["at the recall"]["recall"] < 0.955
        assert row["at the recall"]["oracle density"] < row["at the recall"]["density"] < 1


def test_a_recall_that_no_setting_reaches_is_left_out():
    report = synthetic_heads.main([*SMALL, "--strategies", "flex_prefill", "--recall", "1.1"])
    assert set(report["results"][0]["rows"][0]) == {"name", "as it stands"}

"""benchmarks/long.py on a short prompt: its counts, its synthetic heads and its rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import sparse_prefill as sp
from sparse_prefill.kernel import block_sparse

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import long

SMALL = ["--tokens", "2048", "--heads", "4", "--kv-heads", "2"]


def test_a_row_reports_density_and_memory_of_a_strategy(monkeypatch):
    strategy = "a_shape:local=256,min_length=0"
    make = block_sparse.block_tables
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 4 * 16 * 5)  # in chunks of five rows
    found = long.run(long.parse([*SMALL, "--run", strategy]))
    assert block_sparse.block_tables is make
    assert found["name"] == strategy
    assert found["parts"] > 1
    q, k, v = long.made(2048, 4, 2)
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, sp.get_strategy("a_shape", local=256, min_length=0))
    blocks = sum(float(c.density.mean()) * _blocks(c.q_len, c.kv_len) for c in calls)
    assert found["density"] == pytest.approx(blocks / _blocks(2048, 2048))
    assert found["tensors_gib"] == (2 * q.nbytes + 2 * k.nbytes) / 2**30
    assert 0 < found["lists_gib"] < found["peak_gib"]


def _blocks(q_len, kv_len, size=128):
    return int(sp.Prompt(q_len, kv_len, size).visible().sum())


def test_heads_attend_to_the_first_tokens_and_to_nearby_ones():
    q, k, _ = long.made(1024, 2, 1)
    mass = (q[0, :, -1].float() @ k[0, 0].float().T / long.DIM**0.5).softmax(-1)
    assert (mass[:, :16].sum(-1) + mass[:, -256:].sum(-1) > 0.3).all()
    assert torch.isfinite(mass).all()


def test_each_strategy_runs_in_a_separate_process_and_adds_a_row(tmp_path, monkeypatch):
    ran = []

    class Done:
        stdout = json.dumps({"name": "x"})

    monkeypatch.setattr(long.subprocess, "run", lambda command, **options: ran.append(command) or Done)
    report = long.main([*SMALL, "--strategies", "a_shape", "prism", "--json", str(tmp_path / "long.json")])
    assert [command[-2:] for command in ran] == [["--run", "a_shape"], ["--run", "prism"]]
    assert json.loads((tmp_path / "long.json").read_text()) == report
    assert report["tokens"] == 2048
    assert report["text"] == "synthetic heads"

"""benchmarks/attention.py: its report of random and captured prompts, and its profile."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import reference
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention.py"


@pytest.fixture(scope="module")
def benchmark():
    return runpy.run_path(str(SCRIPT))


def test_random_prompts_are_timed_stage_by_stage(benchmark, tmp_path, capsys):
    out = tmp_path / "results" / "bench.json"
    arguments = ["--lengths", "300", "--heads", "2", "1", "16", "--dtypes", "fp32", "--repeats", "1"]
    strategies = ["--strategies", "flex_prefill:min_length=0,gamma=0.5", "a_shape:min_length=0,local=128"]
    benchmark["main"]([*arguments, *strategies, "--json", str(out)])
    report = json.loads(out.read_text())
    (case,) = report["results"]
    assert case["case"] == "random fp32 300"
    for row, name in zip(case["strategies"], ("flex_prefill", "a_shape"), strict=True):
        assert row["name"].startswith(name)
        assert all(row[stage] > 0 for stage in ("estimate", "select", "table", "kernel", "total"))
        assert 0 < row["density"] <= 1
        assert row["oracle density"] <= 1
        overhead = row["estimate"] + row["select"] + row["table"]
        assert row["overhead share"] == pytest.approx(overhead / row["total"])
    assert "| a_shape:min_length=0,local=128 |" in capsys.readouterr().out


def test_results_of_captured_layers_are_averaged(benchmark, tmp_path, capsys):
    layers = {str(i): reference.random_qkv(heads=2, kv_heads=1, q_len=300, seed=i) for i in (0, 3)}
    torch.save({"layers": layers, "model": "tiny", "text": "prose", "seed": 3}, tmp_path / "captured.pt")
    strategy = ["--strategies", "oracle:min_length=0,share=0.9"]
    report = benchmark["main"](["--qkv", str(tmp_path / "captured.pt"), "--repeats", "1", *strategy])
    (case,) = report["results"]
    assert [report[key] for key in ("model", "text", "seed")] == ["tiny", "prose", 3]
    assert (case["case"], case["layers"]) == ("captured", 2)
    assert case["strategies"][0]["recall"] >= 0.9


def test_prefixes_of_captured_layers_are_profiled(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sparse_prefill.evaluation.profiling.CEILING_SIZES", {"cpu": (2**16, 32)})
    layers = {str(i): reference.random_qkv(q_len=350, seed=i) for i in range(3)}
    torch.save({"layers": layers}, tmp_path / "captured.pt")
    arguments = ["--qkv", str(tmp_path / "captured.pt"), "--lengths", "300", "350", "--every", "2"]
    strategy = ["--strategies", "flex_prefill:min_length=0,gamma=0.5", "--profile", "--repeats", "1"]
    report = benchmark["main"]([*arguments, *strategy])
    case, longer = report["results"]
    assert (longer["case"], longer["tokens"]) == ("captured 350", 350)
    assert report["exponents"].keys() == {"sdpa", "flex_prefill:min_length=0,gamma=0.5"}
    assert (case["case"], case["tokens"], case["dtype"], case["layers"]) == ("captured 300", 300, "float32", 2)
    (row,) = case["strategies"]
    assert row["work"]["kernel"]["gflop/s"] > 0
    assert report["ceilings"].keys() == {"copy gb/s", "float32 gflop/s"}
    assert "| `flex_prefill:min_length=0,gamma=0.5` | kernel |" in capsys.readouterr().out

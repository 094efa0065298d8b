"""The demo recipe on a tiny model: the report has all numbers, and they agree with each other."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_gguf import write_gguf

ROOT = Path(__file__).parents[2]


def run_demo(path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict:
    cfg = OmegaConf.load(ROOT / "recipes" / "configs" / "demo.yaml")
    cfg.model = {"_component_": "sparse_prefill.models.gguf.gguf_decoder", "path": str(path)}
    for part in ("checkpointer", "tokenizer"):
        del cfg[part]["package"]
        cfg[part].path = str(path)
    cfg.strategy = {**cfg.strategy, "block_size": 16, "min_length": 0}
    changes = {"tokens": 400, "max_new_tokens": 3, "repeats": 1, "dtype": "fp32", "output_dir": str(out)}
    config = path.with_name("demo.yaml")
    OmegaConf.save(OmegaConf.merge(cfg, changes), config)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--config", str(config), *overrides])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "recipes" / "demo.py"), run_name="__main__")
    assert not stop.value.code
    return json.loads((out / "report.json").read_text())


def test_the_demo_reports_what_it_measured(tmp_path, monkeypatch, capsys):
    path = write_gguf(tmp_path / "tiny.gguf")
    report = run_demo(path, tmp_path / "out", monkeypatch)
    assert report["tokens"] == 400
    assert report["command"].startswith("python recipes/demo.py --config ")
    assert [report[key] for key in ("model", "text", "seed")] == ["SmolLM2-135M-Instruct", "pydoc", 0]
    assert 0 < report["density"] < 1
    assert report["density"] >= report["oracle_density"] > 0
    assert 0 < report["recall"] < 1
    assert report["expected"] == "5217436"
    for key in ("answer", "answer_nll", "seconds"):
        assert {"dense", "sparse"} <= set(report[key])
    assert report["speedup"]["prefill"] == pytest.approx(report["seconds"]["dense"] / report["seconds"]["sparse"])
    stages = sum(report["attention_seconds"][stage] for stage in ("estimate", "select", "table", "kernel"))
    assert report["attention_seconds"]["sparse"] == pytest.approx(stages)
    assert report["answer_nll"]["sparse"] != report["answer_nll"]["dense"]
    for picture in ("density.png", "head.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 1000
    assert "whole prefill" in capsys.readouterr().out


def test_keeping_all_blocks_gives_the_dense_answer(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    report = run_demo(path, tmp_path / "out", monkeypatch, "strategy.gamma=1.0")
    assert report["density"] == 1
    assert report["answer"]["sparse"] == report["answer"]["dense"]
    assert report["answer_nll"]["sparse"] == pytest.approx(report["answer_nll"]["dense"], abs=1e-4)
    assert report["next_token"]["kl_divergence"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.min_length=4000", "min_length"),
        ("document=short.txt", "document has"),
        ("document=nowhere.txt", "There is no document at nowhere.txt"),
        ("output_dir=short.txt", "short.txt is a file"),
        ("repeats=0", "repeats must be a whole number, 1 or more"),
        ("depth=2", "depth must be"),
        ("token=3", "unknown keys: token"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(override, message, tmp_path, monkeypatch, capsys):
    path = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "short.txt").write_text("Too short.")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        run_demo(path, tmp_path / "out", monkeypatch, override)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("demo.py: ")]
    assert message in line


def test_a_run_leaves_global_torch_settings_unchanged():
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32

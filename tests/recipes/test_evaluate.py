"""The evaluate recipe on a tiny model: its numbers are complete, agree with each other, and persist between runs."""

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
SMALL = {"block_size": 16, "min_length": 0}
SHAPE = {"sink": 16, "local": 32, **SMALL}
ROWS = [
    {"name": "oracle", "row": "oracle, half", "share": 0.5, **SMALL},
    {"name": "oracle", "row": "oracle, all", "share": 1.0, **SMALL},
    {"name": "delta", "row": "delta", "every": 16, "of": {"name": "a_shape", **SHAPE}},
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Paths of a configuration file and of its report."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = write_gguf(folder / "tiny.gguf")
    (folder / "text.txt").write_text("The keeper of the light writes down the wind and the waves each night. " * 40)
    cfg = OmegaConf.load(ROOT / "recipes" / "configs" / "evaluate_smollm2.yaml")
    cfg.model.source = str(model)
    text = {"name": "text", "files": [str(folder / "text.txt")]}
    cfg.options = {"a_shape": SHAPE}
    changes = {
        "tokens": 450,
        "facts": 1,
        "dtype": "fp32",
        "repeats": 1,
        "time_every": 1,
        "strategies": ["a_shape"],
        "more": ROWS,
    }
    changes |= {"texts": [text], "heads_text": text, "output": str(folder / "out" / "report.json")}
    OmegaConf.save(OmegaConf.merge(cfg, changes), folder / "evaluate.yaml")
    return folder / "evaluate.yaml", folder / "out" / "report.json"


def run(settings, monkeypatch, *overrides: str) -> dict:
    config, output = settings
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--config", str(config), *overrides])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "recipes" / "evaluate.py"), run_name="__main__")
    if stop.value.code:
        raise RuntimeError(stop.value.code)
    return json.loads(output.read_text())


def test_every_row_has_density_time_and_answer_quality(settings, monkeypatch):
    report = run(settings, monkeypatch)
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["dense", "a_shape", "oracle, half", "oracle, all", "delta"]
    dense, half, everything = rows["dense"], rows["oracle, half"], rows["oracle, all"]
    for row in (dense, everything):
        assert row["density"] == row["recall"] == pytest.approx(1)
        assert row["output_error"] == pytest.approx(0, abs=1e-4)
        assert row["kl_last_token"] == pytest.approx(0, abs=1e-5)
        assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
        assert row["needle_nll"] == pytest.approx(dense["needle_nll"], abs=1e-4)
    assert 0.5 <= half["recall"] < 1
    assert half["oracle_density"] <= half["density"] < 1
    assert half["output_error"] > 0.01
    assert half["needle_nll"] != dense["needle_nll"]
    assert rows["delta"]["output_error"] != rows["a_shape"]["output_error"]
    assert rows["delta"]["strategy"] == "delta(a_shape)"
    for row in rows.values():
        assert row["needles"] == 1
        assert row["attention_ms"] > 0
        assert row["speedup_attention"] == pytest.approx(dense["attention_ms"] / row["attention_ms"])
        assert row["kernel_ms"] > 0
    assert half["options"]["share"] == 0.5


def test_a_second_run_measures_only_the_missing_strategies(settings, monkeypatch):
    before = run(settings, monkeypatch)
    report = json.loads(settings[1].read_text())
    report["rows"] = [row | {"recall": 0.123} for row in report["rows"] if row["name"] != "a_shape"]
    settings[1].write_text(json.dumps(report))
    after = run(settings, monkeypatch)
    recalls = {row["name"]: row["recall"] for row in after["rows"]}
    assert list(recalls) == [row["name"] for row in before["rows"]]
    assert recalls.pop("a_shape") == pytest.approx(before["rows"][1]["recall"])
    assert set(recalls.values()) == {0.123}


def refused(settings, monkeypatch, capsys, *overrides: str) -> tuple[str, int]:
    """The error line and the exit code of a run."""
    capsys.readouterr()
    with pytest.raises(RuntimeError) as code:
        run(settings, monkeypatch, *overrides)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate.py: ")]
    return line, code.value.args[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokens=440", "tokens is 450 there and 440 now"),
        ("token=440", "unknown keys: token"),
        ("output=/dev/null", "is no regular file"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(override, message, settings, monkeypatch, capsys):
    run(settings, monkeypatch)
    line, code = refused(settings, monkeypatch, capsys, override)
    assert message in line
    assert code == 2


def test_a_strategy_that_runs_dense_fails_and_the_others_are_measured(settings, monkeypatch, tmp_path, capsys):
    other = [
        "strategies=[lserve,local]",
        "options.lserve={block_size: 16, table: [[0.1, 0.2], [0.3, 0.4]]}",
        "more=[]",
        "repeats=0",
    ]
    other += [f"output={tmp_path / 'other.json'}", "options.local={local: 32, block_size: 16, min_length: 0}"]
    line, code = refused(settings, monkeypatch, capsys, *other)
    assert "lserve failed: It ran dense" in line
    assert code == 1
    rows = json.loads((tmp_path / "other.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "local"]


def test_a_switched_off_compiler_is_refused_in_one_line_without_a_report(settings, monkeypatch, tmp_path, capsys):
    with torch._dynamo.config.patch(disable=True):
        line, code = refused(settings, monkeypatch, capsys, f"output={tmp_path / 'other.json'}")
    assert "torch.compile is switched off" in line
    assert code == 1
    assert not (tmp_path / "other.json").exists()


def test_a_short_text_is_refused(settings, monkeypatch, tmp_path, capsys):
    line, _ = refused(settings, monkeypatch, capsys, "tokens=100000", f"output={tmp_path / 'other.json'}")
    assert "The text text has" in line


def test_a_run_leaves_global_torch_settings_unchanged():
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32

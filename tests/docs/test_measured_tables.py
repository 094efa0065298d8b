"""The tables of tasks, calibration and prompts say what the reports hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import measured  # noqa: E402


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    return lambda name, report: (tmp_path / f"{name}.json").write_text(json.dumps(report))


def result(strategy, nll, exact, density):
    return {"task": "vt", "length": 2048, "strategy": strategy, "nll": nll, "exact": exact, "density": density}


def test_tasks_are_means_over_samples_with_plain_text_beside(write):
    chat = [
        result("dense", 1.0, 0, 1.0),
        result("dense", 2.0, 0.5, 1.0),
        result("prism", 3.0, 1, 0.25),
        result("prism", 4.0, 0, 0.35),
    ]
    write("tasks_smollm2_2k", {"model": "m", "tasks": {"results": chat}})
    write("tasks_smollm2_2k_plain", {"model": "m", "tasks": {"results": [result("dense", 0.5, 1, 1.0)]}})
    text = measured.tasks(DOCS / "tasks.md")
    assert "| task | density of `prism` | exact: dense | exact: `prism` | NLL: dense | NLL: `prism` | beyond" in text
    assert "| `vt` | 0.30 | 0.25 | 0.50 | 1.50 | 3.50 | yes |" in text
    assert "| `vt` | 1.50 | 0.50 |" in text


def test_calibration_has_its_targets_and_the_law_at_another_length(write):
    met = {"recall": 0.95, "density": 0.4}
    row = {
        "name": "prism",
        "option": "share",
        "cpu_seconds": {"observe": 40.2, "bisect": 0.7},
        "values": {"least": 0.1, "median": 0.5, "most": 1.0},
        "calibrated": met,
        "one_value": {**met, "density": 0.5},
        "held_out": {**met, "recall": 0.94},
        "held_out_by_text": {"prose": {"recall": 0.93}, "code": {"recall": 0.96}},
    }
    error = {"tokens": 8192, "target": 0.9, "recall": 0.91, "density": 0.2, "log_ratio": 0.86}
    error |= {"calibrated_recall": 0.92, "calibrated_density": 0.3}
    law = {"name": "law of prism", "lengths": [2048, 4096], "b": -12.04, "cpu_seconds": 81.2, "errors": [error]}
    write("calibration_smollm2_4k", {"held_out": {"prose": [], "code": []}, "rows": [row, law]})
    text = measured.calibration(DOCS / "calibration.md")
    cells = "0.950 at 0.40 | 0.950 at 0.50 | 0.940 at 0.40 | 0.930, 0.960 | 40, 0.7 |"
    assert f"| `prism` | `share` 0.1, 0.5, 1 | {cells}" in text
    assert "law of `prism`, fitted on the first 2,048, 4,096 tokens of the sample (b = -12.0, 81 seconds" in text
    assert "| 0.9 | 0.910 at 0.20 | 0.920 at 0.30 | 0.86 |" in text


def test_prompts_in_batches_and_in_chunks(write):
    run = {"seconds": 8.04, "tokens": 16000, "tokens_per_second": 1990.0, "speedup": 1.751, "peak_gib": 4.456}
    report = {"strategy": "prism", "runs": {"sparse": {**run, "density": 0.231}}}
    write("prompts_batch_smollm2", report)
    write("prompts_chunks_qwen_16k", report)
    assert "| sparse | 8.0 | 1990 | 1.75x | 4.5 GiB | 0.23 |" in measured.batch(DOCS / "batches.md")
    text = measured.chunks(DOCS / "batches.md")
    assert "| `prism` | seconds |" in text
    assert "| sparse | 8.0 | 1.75x | 4.46 GiB | 0.23 |" in text
    assert "*16,000 tokens*" in text


def test_captions_tell_what_was_measured_on_what():
    report = {"model": "m", "text": "pydoc", "tokens": 8000, "layers": 5, "dtype": "bf16", "device": "a CPU"}
    report |= {"threads": 2, "torch": "2.13", "date": "2026-11-25T00:00:00", "command": "python x.py"}
    whole = "*m on pydoc, 8,000 tokens, 5 layers, bf16, a CPU, 2 threads, torch 2.13, 2026-11-25; `python x.py`*"
    assert measured.caption(report) == whole
    assert measured.caption({"model": "m", "haystack": "pydoc", "threads": 1}) == "*m on pydoc, 1 thread*"

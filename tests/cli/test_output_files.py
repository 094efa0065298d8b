"""Output files of commands are checked before a model is loaded."""

from __future__ import annotations

import json
import os

import pytest

from sparse_prefill.cli import main
from sparse_prefill.evaluation.results import Results

COMMANDS = {  # the missing model would be reported later
    "bench": ["bench", "-m", "no-such-model"],
    "eval": ["eval", "-m", "no-such-model"],
    "calibrate, a plan": ["calibrate", "-m", "no-such-model", "-s", "mean_pool"],
    "calibrate, patterns": ["calibrate", "-m", "no-such-model", "-s", "minference"],
    "plot": ["plot", "-m", "no-such-model"],
}
ENDING = {"calibrate, a plan": ".yaml", "plot": ".png"}


@pytest.mark.parametrize("command", COMMANDS)
def test_unwritable_outputs_are_refused_before_the_model_is_loaded(command, tmp_path, capsys):
    ending = ENDING.get(command, ".json")
    (tmp_path / "file").write_text("")
    (tmp_path / f"folder{ending}").mkdir()
    os.mkfifo(tmp_path / f"pipe{ending}")
    (tmp_path / f"device{ending}").symlink_to("/dev/zero")
    (tmp_path / f"input{ending}").write_text("a text")
    for name, message in (
        (f"folder{ending}", "is a folder"),
        (f"pipe{ending}", "is no regular file"),
        (f"device{ending}", "is no regular file"),
        (f"file/below{ending}", "is a file, and no folder"),
        (f"input{ending}", "is what the command reads"),
    ):
        words = [*COMMANDS[command], "--text", str(tmp_path / f"input{ending}"), "-o", str(tmp_path / name)]
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert (tmp_path / f"input{ending}").read_text() == "a text"


def test_a_report_never_overwrites_its_results(tmp_path, capsys):
    path = tmp_path / "eval.json"
    path.write_text(content := json.dumps({"rows": [{"name": "dense", "density": 1.0, "recall": 1.0}]}))
    assert main(["report", str(path), "-o", str(path)]) == 2
    assert "is what the command reads" in capsys.readouterr().err
    assert path.read_text() == content


@pytest.mark.parametrize("content", [{"rows": [{"name": 3}]}, {"rows": [3]}, {"rows": {}}, {"tasks": [3]}, [], "text"])
def test_reports_with_another_structure_are_refused(content, tmp_path, capsys):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(content))
    for command in ("report", "plot"):
        assert main([command, str(path)]) == 2
        assert str(path) in capsys.readouterr().err.splitlines()[-1]


def test_results_are_written_through_a_symbolic_link(tmp_path):
    (tmp_path / "link.json").symlink_to("far/results.json")
    results = Results(tmp_path / "link.json", {"seed": 0}, {})
    results.put("dense", {"density": 1.0})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "far" / "results.json").read_text())["rows"] == [{"name": "dense", "density": 1.0}]
    assert Results(tmp_path / "link.json", {"seed": 0}, {}).row("dense") == {"name": "dense", "density": 1.0}

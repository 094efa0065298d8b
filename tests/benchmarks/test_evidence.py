"""benchmarks/evidence.py: its steps run, resume after a failure, and save their results."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "evidence.py"
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def evidence():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def small(evidence, tmp_path):
    """The script with three steps; the second one fails until the file ``allowed`` exists."""

    def python(code: str) -> str:
        return f"{sys.executable} -c '{code}'"

    step, saved = evidence["Step"], tmp_path / "saved.json"
    write = 'open("{out}/a.json", "a").write("{dtype}\\n")'
    allowed = f'import pathlib, sys; sys.exit(not pathlib.Path("{tmp_path}/allowed").exists())'
    steps = {
        "first": step("it writes", [python(write)], [python(write)], [("a.json", saved)]),
        "second": step("it may fail", [python(allowed)], [python(allowed)], exclusive=True),
        "third_qwen": step("it has a model", [python('open("{qwen}")')], []),
    }
    evidence["main"].__globals__["STEPS"] = steps
    out = tmp_path / "out"
    return lambda *words: evidence["main"](["--out", str(out), *words]), out, saved


def test_finished_steps_are_saved_and_not_run_again(small, tmp_path, capfd):
    main, out, saved = small
    assert main() == 1
    assert "failed: second" in capfd.readouterr().err
    assert saved.read_text() == "bf16\n"
    assert list(json.loads((out / "finished.json").read_text())) == ["first"]
    (tmp_path / "allowed").touch()
    assert main() == 0
    printed = capfd.readouterr().err
    assert "first: finished on" in printed
    assert "third_qwen: left out" in printed
    assert saved.read_text() == "bf16\n"
    assert main("--only", "first", "--dtype", "fp32") == 0
    assert saved.read_text() == "bf16\nfp32\n"
    assert main("--again", "--qwen", str(tmp_path / "allowed")) == 0
    assert set(json.loads((out / "finished.json").read_text())) == {"first", "second", "third_qwen"}


def test_results_are_saved_with_one_record_per_line(evidence, tmp_path):
    source, target = tmp_path / "source.json", tmp_path / "results" / "target.json"
    source.write_text(json.dumps({"rows": [{"name": "dense", "by_prompt": {}, "density": 1.0}]}))
    evidence["keep"].__globals__["RESULTS"] = target.parent
    evidence["keep"](source, target)
    assert target.read_text() == '{\n "rows": [\n  {"name": "dense", "density": 1.0}\n ]\n}\n'


def test_quick_steps_overwrite_nothing(small):
    main, out, saved = small
    assert main("--quick", "--only", "first") == 0
    assert (out / "a.json").exists()
    assert not saved.exists()


def test_ctrl_c_stops_the_run_with_exit_code_130(small, evidence, monkeypatch, capfd):
    main, out, _ = small

    def interrupted(*words, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.run", interrupted)
    assert main() == 130
    assert "the same command goes on" in capfd.readouterr().err
    assert not (out / "finished.json").exists()


def test_unknown_steps_and_models_are_refused(evidence):
    for words in (["--only", "everything"], ["--qwen", "nowhere.gguf"]):
        with pytest.raises(SystemExit) as stop:
            evidence["main"](words)
        assert stop.value.code == 2


@pytest.mark.parametrize("words", [[], ["--quick"]])
def test_commands_name_existing_scripts_and_files(evidence, words, capsys):
    assert evidence["main"](["--list", *words]) == 0
    printed = capsys.readouterr().out
    assert [line.partition(":")[0] for line in printed.splitlines() if line[0] != " "] == list(evidence["STEPS"])
    assert not re.search(r"\{(out|dtype|qwen)\}", printed)
    for path in re.findall(r"(?:recipes|benchmarks|docs)/[\w/]+\.(?:py|yaml)", printed):
        assert (ROOT / path).is_file(), path


def test_every_committed_result_has_a_step(evidence):
    saved = {target.name for step in evidence["STEPS"].values() for _, target in step.keep}
    committed = {path.name for path in COMMITTED if "gpu" not in path.name}
    assert committed <= saved


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_name_their_machine_model_text_and_seed(path):
    report = json.loads(path.read_text())
    assert all(report[key] for key in ("date", "command", "device", "threads", "torch", "sparse_prefill", "python"))
    assert report["model"]
    assert report.get("text") or report.get("texts") or report.get("haystack")
    assert isinstance(report["seed"], int)

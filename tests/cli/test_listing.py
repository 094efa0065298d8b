"""list, show, errors and progress of commands."""

import json
import subprocess
import sys

import pytest

import sparse_prefill as sp
from sparse_prefill.cli import main, show
from sparse_prefill.cli.progress import Progress


def test_list_names_every_strategy_and_wrapper_with_its_summary(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    listed = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  ")}
    assert set(listed) == {*sp.list_strategies(), *sp.list_wrappers()}
    assert all(len(line.split()) > 3 for line in listed.values())


def test_list_as_json(capsys):
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {kind: list(names) for kind, names in found.items()} == {
        "strategies": sp.list_strategies(),
        "wrappers": sp.list_wrappers(),
    }
    assert found["strategies"]["a_shape"].endswith(".")


@pytest.mark.parametrize("name", ["flex_prefill", "by_head"])
def test_show_prints_the_idea_and_the_options(name, capsys):
    assert main(["show", name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(name)
    assert "Args:" in printed
    assert "gamma = 0.8" in printed if name == "flex_prefill" else "of = (needed)" in printed


def test_show_as_json(capsys):
    assert main(["show", "delta", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["kind"], found["needed"]) == ("delta", "wrapper", ["of"])
    assert found["options"]["every"] == 64
    assert "Args:" in found["doc"]
    assert "arXiv" in found["paper"]


def test_an_unknown_name_gives_one_line_and_exit_code_two(capsys):
    assert main(["show", "flexprefill"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "There is no 'flexprefill'" in error
    assert "flex_prefill" in error


@pytest.mark.parametrize("words", [[], ["lists"], ["list", "--yaml"], ["show"]])
def test_wrong_arguments_give_exit_code_two(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: sparse-prefill" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a must be b,\n  got c."), 2, "a must be b, got c."),
        (FileNotFoundError(2, "No such file or directory", "there"), 2, "there: No such file or directory"),
        (ModuleNotFoundError("No module", name="matplotlib.figure"), 2, "pip install 'sparse-prefill[plot]'"),
        (RuntimeError("out of memory"), 1, "RuntimeError: out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_give_one_line_and_an_exit_code(error, code, line, monkeypatch, capsys):
    def fail(name):
        raise error

    monkeypatch.setattr(show, "describe", fail)
    assert main(["show", "dense"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sparse-prefill: ")
    assert line in printed.err
    assert printed.err.count("\n") == 1


def test_an_internal_error_shows_a_traceback(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module", name="sparse_prefill.nothing")

    monkeypatch.setattr(show, "describe", fail)
    with pytest.raises(ModuleNotFoundError):
        main(["show", "dense"])


def test_a_closed_output_pipe_is_not_an_error():
    command = [sys.executable, "-m", "sparse_prefill.cli", "show", "flex_prefill"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


def test_progress_prints_one_line_per_step_without_a_terminal(capsys):
    with Progress() as progress:
        progress(0, 0, "load")
        progress(0, 2, "first")
        progress(1, 2, "second")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "load\n[0/2] first\n[1/2] second\n"


def test_progress_shows_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress() as progress:
        progress(1, 4, "measure it")
        progress.bar.refresh()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "measure it" in printed.err
    assert "1/4" in printed.err


def test_progress_works_without_rich(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with Progress() as progress:
        progress(0, 1, "measure it")
    assert capsys.readouterr().err == "[0/1] measure it\n"

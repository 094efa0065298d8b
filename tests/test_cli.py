"""The command line lists and shows what is registered."""

import pytest

import sparse_prefill as sp
from sparse_prefill.cli import main


def test_list_names_every_strategy_and_wrapper_with_its_summary(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    listed = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  ")}
    assert set(listed) == {*sp.list_strategies(), *sp.list_wrappers()}
    assert all(len(line.split()) > 3 for line in listed.values())


@pytest.mark.parametrize("name", ["flex_prefill", "by_head"])
def test_show_tells_the_idea_and_the_options(name, capsys):
    assert main(["show", name]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(name)
    assert "Args:" in printed
    assert "gamma = 0.8" in printed if name == "flex_prefill" else "of = (needed)" in printed


def test_an_unknown_name_is_one_line_and_exit_code_two(capsys):
    assert main(["show", "flexprefill"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "There is no 'flexprefill'" in error
    assert "flex_prefill" in error


def test_a_command_is_needed():
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2

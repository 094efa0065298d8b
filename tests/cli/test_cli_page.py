"""The page about the command line shows every command, with valid options."""

import re
import shlex
from pathlib import Path

import pytest

from sparse_prefill.cli import COMMANDS, parser

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text().replace("\\\n", " ")
EXAMPLES = [line for line in PAGE.splitlines() if line.startswith("sparse-prefill ") and "--help" not in line]


def test_every_command_has_an_example_with_its_output():
    assert {line.split()[1] for line in EXAMPLES} == set(COMMANDS)
    for command in set(COMMANDS) - {"list", "show"}:
        assert re.search(rf"^## {command}\n\n```bash\n(?:sparse-prefill .*\n)+```\n```text\n.+", PAGE, re.MULTILINE), (
            command
        )


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_use_existing_options(line):
    parser().parse_args(shlex.split(line)[1:])

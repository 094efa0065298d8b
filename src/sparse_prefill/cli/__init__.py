"""The command line ``sparse-prefill``: one file per command, and here the parser and the entry point.

Exit codes: 0 for success, 1 if a measurement failed, 2 for wrong use, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from sparse_prefill.cli.exits import exit_code

# The file of each command. The parser imports all of them, so none imports a model's library at its top.
COMMANDS = {
    "list": "listing",
    "show": "show",
    "bench": "bench",
    "eval": "evaluate",
    "calibrate": "calibrate",
    "plot": "plot",
    "report": "report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (Sequence[str] | None): words of the command line. Default: those of this process.

    Returns:
        int: the exit code. An error is one line on stderr.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    options.words = words
    # torchtune normalises in fp32 on purpose, and torch warns that it has no fused kernel for that.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns that its extensions are for another torch
    return exit_code("sparse-prefill", lambda: options.run(options))


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    main_parser = argparse.ArgumentParser(
        prog="sparse-prefill",
        description="Sparse prefill attention for PyTorch: lists strategies and measures them on your model.",
        epilog="Exit codes: 0 success, 1 a measurement failed, 2 wrong use, 130 interrupted.",
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, file in COMMANDS.items():
        module = import_module(f"sparse_prefill.cli.{file}")
        summary, _, details = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary.rstrip("."),
            description=f"{summary}\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return main_parser

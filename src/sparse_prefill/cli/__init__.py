"""The command line ``sparse-prefill``: a file for each command, and here what they share around them.

Exit codes: 0 for success, 1 where a measurement failed, 2 for wrong use, 130 where Ctrl-C ended it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

# The file of each command, read when the parser is made; none of them imports a model's library by itself.
COMMANDS = {
    "list": "listing",
    "show": "show",
    "bench": "bench",
    "eval": "evaluate",
    "calibrate": "calibrate",
    "plot": "plot",
    "report": "report",
}
EXTRAS = {  # what has to be installed for a package that is missing
    "matplotlib": "plot",
    "yaml": "yaml",
    "torchtune": "torchtune",
    "torchao": "torchtune",
    "gguf": "models",
    "tokenizers": "models",
    "safetensors": "models",
    "transformers": "transformers",
    "wonderwords": "tasks",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (Sequence[str] | None): words of the command line. Default: those of this process.

    Returns:
        int: the exit code. Errors are one line on stderr.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    options.words = words
    # torchtune normalises in fp32 on purpose; torch notes that it has no fused kernel for that.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # which notes that its extensions are for another torch
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough, as in `sparse-prefill list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        return _failed(str(interrupt) or "interrupted", 130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _failed(f"{package} isn't installed: pip install 'sparse-prefill[{EXTRAS[package]}]'", 2)
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except ValueError as error:
        return _failed(str(error), 2)
    except (RuntimeError, MemoryError) as error:  # torch's own, e.g. out of memory
        return _failed(f"{type(error).__name__}: {error}", 1)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    main_parser = argparse.ArgumentParser(
        prog="sparse-prefill",
        description="Sparse prefill attention for PyTorch: what strategies there are, and what they do to your model.",
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


def _failed(message: str, code: int) -> int:
    print(f"sparse-prefill: {' '.join(message.split())}", file=sys.stderr)
    return code

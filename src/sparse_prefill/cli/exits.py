"""Exit codes of commands and recipes, with one line on stderr in place of a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

EXTRAS = {  # the extra of this package that installs another package
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


def exit_code(program: str, run: Callable[[], int | None]) -> int:
    """Run a command.

    Args:
        program (str): name of the command, at the start of an error's line.
        run (Callable[[], int | None]): the command, which returns its exit code; None is 0.

    Returns:
        int: 0 for success, 1 if a measurement failed, 2 for wrong use, 130 after Ctrl-C.
    """

    def failed(message: str, code: int) -> int:
        line = " ".join(message.split()).encode(errors="backslashreplace").decode()
        print(f"{program}: {line}", file=sys.stderr)
        return code

    try:
        code = run()
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:  # the reader stops early, as in `sparse-prefill list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        return failed(str(interrupt) or "interrupted", 130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return failed(f"{package} isn't installed: pip install 'sparse-prefill[{EXTRAS[package]}]'", 2)
    except OSError as error:
        return failed(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except ValueError as error:
        return failed(str(error), 2)
    except (RuntimeError, MemoryError) as error:  # of torch, e.g. out of memory
        return failed(f"{type(error).__name__}: {error}", 1)

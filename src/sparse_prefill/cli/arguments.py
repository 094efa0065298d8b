"""Arguments that commands share: the model, the strategies and the text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sparse_prefill.cli.progress import Progress
from sparse_prefill.plan import Plan
from sparse_prefill.spec import parse_strategy
from sparse_prefill.strategy import Strategy

if TYPE_CHECKING:
    from sparse_prefill.models.subject import Subject

MODEL = "a GGUF file, a folder of Hugging Face's format, or an installed package with a GGUF file in it"
SPEC = (
    "a strategy: NAME, NAME:OPTION=VALUE,OPTION=VALUE, WRAPPER(NAME), or a plan file (.yaml, .json); "
    "may be given several times"
)


def add_model(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """``--model``; with :func:`add_machine`, what :func:`load_model` reads."""
    parser.add_argument("-m", "--model", required=required, metavar="MODEL", help=MODEL)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, ``--device`` and ``--threads``."""
    group = parser.add_argument_group("machine")
    group.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="default: fp32")
    group.add_argument("--device", default="cpu", help="default: cpu")
    group.add_argument("--threads", type=count, metavar="N", help="CPU threads. Default: what torch chooses")


def load_model(options: argparse.Namespace, progress: Progress) -> Subject:
    """The model of ``--model`` on the machine of :func:`add_machine`."""
    from sparse_prefill.models.subject import load

    use_machine(options)
    progress(0, 0, f"load {options.model}")
    return load(options.model, dtype=options.dtype, device=options.device)


def use_machine(options: argparse.Namespace) -> None:
    """Set the threads; ValueError where the device isn't there."""
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"There is no device {options.device!r} here: {reason}") from None


def add_strategies(parser: argparse.ArgumentParser, default: str) -> None:
    """``--strategy``, as many as are wanted."""
    parser.add_argument(
        "-s", "--strategy", action="append", dest="strategies", metavar="SPEC", help=f"{SPEC}. Default: {default}"
    )


def strategies_of(specs: Sequence[str]) -> dict[str, Strategy | Plan]:
    """The strategies by the words that name them; ValueError if one is named twice."""
    found = {spec: parse_strategy(spec) for spec in specs}
    if len(found) < len(specs):
        twice = next(spec for spec in specs if list(specs).count(spec) > 1)
        raise ValueError(f"The strategy {twice!r} is given twice: leave one out.")
    return found


def count(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value

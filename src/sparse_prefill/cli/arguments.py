"""Arguments that commands share: the model, the strategies and the text."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sparse_prefill.cli.progress import Progress
from sparse_prefill.plan import Plan
from sparse_prefill.spec import parse_strategy
from sparse_prefill.strategy import Strategy

if TYPE_CHECKING:
    from sparse_prefill.models.eval_model import EvalModel

MODEL = "a GGUF file, a folder of Hugging Face's format, or an installed package with a GGUF file in it"
SPEC = (
    "a strategy: NAME, NAME:OPTION=VALUE,OPTION=VALUE, WRAPPER(NAME), or a plan file (.yaml, .json); "
    "may be given several times"
)


def add_model(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """``--model``, which :func:`load_model` reads with the arguments of :func:`add_machine`."""
    parser.add_argument("-m", "--model", required=required, metavar="MODEL", help=MODEL)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """``--dtype``, ``--device`` and ``--threads``."""
    group = parser.add_argument_group("machine")
    group.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="default: fp32")
    group.add_argument("--device", default="cpu", help="default: cpu")
    group.add_argument("--threads", type=count, metavar="N", help="CPU threads. Default: what torch chooses")


def load_model(options: argparse.Namespace, progress: Progress) -> EvalModel:
    """The model of ``--model`` on the machine of :func:`add_machine`."""
    from sparse_prefill.models.eval_model import load

    use_machine(options)
    progress(0, 0, f"load {options.model}")
    return load(options.model, dtype=options.dtype, device=options.device)


def use_machine(options: argparse.Namespace) -> None:
    """Set the number of threads; ValueError if the device doesn't exist."""
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"There is no device {options.device!r} here: {reason}") from None


def add_strategies(parser: argparse.ArgumentParser, default: str) -> None:
    """``--strategy``, which may be given several times."""
    parser.add_argument(
        "-s", "--strategy", action="append", dest="strategies", metavar="SPEC", help=f"{SPEC}. Default: {default}"
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    """``--text`` and ``--tokens``, which :func:`read_tokens` reads."""
    group = parser.add_argument_group("text")
    source = "a file, `pydoc` (the reference that comes with Python) or `stdlib:MODULE`. Default: pydoc"
    group.add_argument("--text", default="pydoc", metavar="FILE", help=source)
    group.add_argument("--tokens", type=count, default=4096, metavar="N", help="tokens of the text. Default: 4096")


def read_tokens(subject: EvalModel, source: str, tokens: int, skip: int = 0) -> torch.Tensor:
    """The first tokens of a text, int64 [1, tokens]; ValueError if it has fewer."""
    from sparse_prefill.evaluation.texts import read_source

    ids = subject.encode(read_source(source))
    if len(ids) < skip + tokens:
        raise ValueError(f"{source} has {len(ids)} tokens, but {skip + tokens} are needed: take a longer text.")
    return torch.tensor([ids[skip : skip + tokens]])


def strategies_of(specs: Sequence[str]) -> dict[str, Strategy | Plan]:
    """The strategies by their specs; ValueError if one is given twice."""
    found = {spec: parse_strategy(spec) for spec in specs}
    if len(found) < len(specs):
        twice = next(spec for spec in specs if list(specs).count(spec) > 1)
        raise ValueError(f"The strategy {twice!r} is given twice: leave one out.")
    return found


def command_line(options: argparse.Namespace) -> str:
    """The command, as it could be typed again."""
    return shlex.join(["sparse-prefill", *options.words])


def count(text: str) -> int:
    """A whole number, 1 or more, for argparse."""
    return _at_least(1, text)


def number(text: str) -> int:
    """A whole number, 0 or more, for argparse."""
    return _at_least(0, text)


def fraction(text: str) -> float:
    """A number in [0, 1], for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {value:g}")
    return value


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more, got {value}")
    return value

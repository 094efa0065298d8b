"""The command line: what strategies there are, and what each one is."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from sparse_prefill import registry
from sparse_prefill.strategy import list_strategies, list_wrappers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors of the user are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="sparse-prefill", description="Sparse prefill attention for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all strategies and wrappers, a line each")
    show = commands.add_parser("show", help="one strategy or wrapper: its paper, its idea and its options")
    show.add_argument("name")
    options = parser.parse_args(arguments)
    try:
        print(overview() if options.command == "list" else describe(options.name))
    except ValueError as error:
        print(f"sparse-prefill: {error}", file=sys.stderr)
        return 2
    return 0


def overview() -> str:
    """Names and summaries of all strategies and wrappers."""
    lines = []
    for title, kind in (("Strategies", registry.strategies), ("Wrappers", registry.wrappers)):
        lines += [title, *(f"  {name:18} {_summary(kind.factory(name))}" for name in kind.names())]
    return "\n".join(lines)


def describe(name: str) -> str:
    """Paper, docstring and options of a strategy or wrapper; ValueError if there is none of that name."""
    kind = registry.wrappers if name in list_wrappers() else registry.strategies
    if kind is registry.strategies and name not in list_strategies():
        raise ValueError(f"There is no {name!r}. There are: {', '.join([*list_strategies(), *list_wrappers()])}.")
    factory = kind.factory(name)
    paper = getattr(factory, "paper", "")
    options = (
        f"  {option} = {'(needed)' if default is inspect.Parameter.empty else repr(default)}"
        for option, default in kind.options(name).items()
    )
    return "\n".join([name, *([paper] if paper else []), "", inspect.getdoc(factory) or "", "", "Options:", *options])


def _summary(factory: object) -> str:
    return (inspect.getdoc(factory) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())

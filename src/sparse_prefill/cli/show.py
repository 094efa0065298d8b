"""Show one strategy or wrapper: its paper, its idea and its options."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from sparse_prefill import registry
from sparse_prefill.cli.output import add_json, print_json
from sparse_prefill.strategy import list_strategies, list_wrappers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a name from `sparse-prefill list`")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    found = describe(options.name)
    if options.json:
        print_json(found)
        return 0
    lines = [f"  {name} = {'(needed)' if name in found['needed'] else repr(value)}" for name, value in _all(found)]
    print("\n".join([found["name"], *filter(None, [found["paper"]]), "", found["doc"], "", "Options:", *lines]))
    return 0


def describe(name: str) -> dict[str, Any]:
    """Name, kind, paper, docstring, options with their defaults, and needed options, of a strategy or wrapper.

    Raises:
        ValueError: if there is none of that name.
    """
    kind = registry.wrappers if name in registry.wrappers else registry.strategies
    if name not in kind:
        raise ValueError(f"There is no {name!r}. There are: {', '.join([*list_strategies(), *list_wrappers()])}.")
    factory, options = kind.factory(name), kind.options(name)
    return {
        "name": name,
        "kind": kind.kind,
        "paper": getattr(factory, "paper", ""),
        "doc": inspect.getdoc(factory) or "",
        "options": {option: value for option, value in options.items() if value is not inspect.Parameter.empty},
        "needed": [option for option, value in options.items() if value is inspect.Parameter.empty],
    }


def _all(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return [*((name, None) for name in found["needed"]), *found["options"].items()]

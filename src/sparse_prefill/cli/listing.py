"""List all strategies and wrappers, one line each."""

from __future__ import annotations

import argparse
import inspect

from sparse_prefill import registry
from sparse_prefill.cli.output import add_json, print_json

KINDS = {"strategies": registry.strategies, "wrappers": registry.wrappers}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    found = {kind: {name: _summary(of.factory(name)) for name in of.names()} for kind, of in KINDS.items()}
    if options.json:
        print_json(found)
        return 0
    for kind, summaries in found.items():
        print(kind.capitalize())
        for name, summary in summaries.items():
            print(f"  {name:18} {summary}")
    return 0


def _summary(factory: object) -> str:
    return (inspect.getdoc(factory) or "").partition("\n")[0]

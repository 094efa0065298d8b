"""Write the results of an evaluation as one self-contained HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_prefill.cli.output import add_json, print_json, shown_from
from sparse_prefill.core.files import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, metavar="RESULTS", help="what `sparse-prefill eval` wrote")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: next to the results")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from sparse_prefill.evaluation.results import read_report
    from sparse_prefill.report import write_report

    path = options.output or options.results.with_suffix(".html")
    results = read_report(options.results)
    target = check_output(path, [options.results])
    with shown_from(options.results):
        write_report(results, target)
    if options.json:
        print_json({"report": str(path)})
    else:
        print(path)
    return 0

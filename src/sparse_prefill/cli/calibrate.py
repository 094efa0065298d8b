"""Find the option value that each layer and group of heads needs for a recall or a density, and write it as a plan.

For most strategies the result is a plan (.yaml). For minference it is a file of patterns (.json), found by the search
of its paper, and for duo_attention and lserve a table of heads (.tsv). Recall and density are then measured on the next
part of the text, which nothing was fitted to.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparse_prefill.cli.arguments import (
    SPEC,
    add_machine,
    add_model,
    add_text,
    fraction,
    load_model,
    read_tokens,
)
from sparse_prefill.cli.output import add_json, print_json
from sparse_prefill.cli.progress import Progress
from sparse_prefill.core.files import check_output
from sparse_prefill.kernel.compiled import check_can_run
from sparse_prefill.models.at_length import sparse_at_length
from sparse_prefill.plan import Plan, with_options
from sparse_prefill.spec import parse_options, parse_strategy
from sparse_prefill.strategy import Strategy, as_strategy

if TYPE_CHECKING:
    from sparse_prefill.models.eval_model import EvalModel

PATTERNS = ("minference",)
TABLES = ("duo_attention", "lserve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-s", "--strategy", required=True, metavar="SPEC", help=SPEC.partition(", or a plan")[0])
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--recall", type=fraction, metavar="X", help="attention mass to keep. Default: 0.95")
    target.add_argument("--density", type=fraction, metavar="X", help="share of blocks to compute, instead of a recall")
    parser.add_argument("--by", choices=["layer", "group", "head"], help="what gets a separate value. Default: group")
    add_text(parser)
    add_machine(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="plan, patterns or table")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    spec = parse_options(options.strategy)
    find = _find_patterns if spec["name"] in PATTERNS else _find_table if spec["name"] in TABLES else _find_plan
    _check(options, spec["name"])
    target = check_output(options.output, [options.model, options.text])
    check_can_run()  # as the sparse layers do that verify the result
    target.parent.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        subject = load_model(options, progress)
        tokens = read_tokens(subject, options.text, options.tokens)
        found, details = find(options, subject, tokens, progress)
        report = {"strategy": options.strategy, "output": str(options.output), **details}
        try:
            report["held_out"] = _held_out(options, subject, found, progress)
        except ValueError as error:  # the text has no more tokens, or a window holds them all
            report |= {"held_out": None, "reason": str(error)}
    if options.json:
        print_json(report)
    else:
        _print(report)
    return 0


def _check(options: argparse.Namespace, name: str) -> None:
    """Raise ValueError for wrong options before a model is loaded."""
    if name in PATTERNS + TABLES:
        for target in ("recall", "by"):
            if getattr(options, target) is not None:
                raise ValueError(f"--{target} has no meaning for {name}: drop it.")
        if name in TABLES and options.density is not None:
            raise ValueError(f"--density has no meaning for {name}: set its option sparsity.")
        return
    from sparse_prefill.calibration import tunable_option_of

    strategy = parse_strategy(options.strategy)
    assert isinstance(strategy, Strategy), "plans aren't read from a spec"
    tunable_option_of(strategy)
    if options.output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"A plan is written as YAML: call it {options.output.with_suffix('.yaml')}.")


def _find_plan(
    options: argparse.Namespace, subject: EvalModel, tokens: Tensor, progress: Progress
) -> tuple[Plan, dict[str, Any]]:
    from sparse_prefill.calibration import as_plan, calibrate

    strategy = as_strategy(parse_options(options.strategy))
    target = {name: x for name, x in (("recall", options.recall), ("density", options.density)) if x is not None}
    target = target or {"recall": 0.95}
    steps = _steps(progress, "calibrate")
    sparse = sparse_at_length(strategy, tokens.shape[1], subject.device)
    found = calibrate(subject, sparse, [tokens], by=options.by, on_progress=steps, **target)
    # The plan keeps the strategy's own min_length.
    as_plan(strategy, {(one.layer, one.heads): one.value for one in found.groups}).save(options.output)
    groups = [
        {"layer": one.layer, "heads": list(one.heads), "value": one.value, "recall": one.recall, "density": one.density}
        for one in found.groups
    ]
    return found.plan, {"target": target, "recall": found.recall, "density": found.density, "groups": groups}


def _find_patterns(
    options: argparse.Namespace, subject: EvalModel, tokens: Tensor, progress: Progress
) -> tuple[Strategy, dict[str, Any]]:
    from sparse_prefill.calibration import search_patterns
    from sparse_prefill.strategies.minference import MInference, save_patterns

    sparse = sparse_at_length(as_strategy(parse_options(options.strategy)), tokens.shape[1], subject.device)
    assert isinstance(sparse, MInference), "the name says so"
    density = 0.25 if options.density is None else options.density
    steps = _steps(progress, "search patterns")
    layers = search_patterns(subject, [tokens], density=density, strategy=sparse, on_progress=steps)
    save_patterns(options.output, layers)
    kinds = [pattern.type for heads in layers for pattern in heads.values()]
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return with_options(sparse, config=str(options.output)), {"target": {"density": density}, "patterns": counts}


def _find_table(
    options: argparse.Namespace, subject: EvalModel, tokens: Tensor, progress: Progress
) -> tuple[Strategy, dict[str, Any]]:
    from sparse_prefill.calibration import estimate_head_table
    from sparse_prefill.head_table import save_table

    table = estimate_head_table(subject, [tokens], on_progress=_steps(progress, "estimate a table of heads"))
    save_table(table, options.output)
    flat = [loss for row in table for loss in row]
    strategy = as_strategy({**parse_options(options.strategy), "table": str(options.output)})
    loss = {"least": min(flat), "most": max(flat), "mean": sum(flat) / len(flat)}
    return sparse_at_length(strategy, tokens.shape[1], subject.device), {"loss": loss}


def _held_out(
    options: argparse.Namespace, subject: EvalModel, found: Plan | Strategy, progress: Progress
) -> dict[str, float]:
    """Recall and density on the tokens after those of the calibration."""
    from sparse_prefill.calibration import verify

    tokens = read_tokens(subject, options.text, options.tokens, skip=options.tokens)
    progress(0, 1, "verify on held-out text")
    verified = verify(subject, found, [tokens])
    return {"recall": verified.recall, "density": verified.density}


def _print(report: dict[str, Any]) -> None:
    if "target" in report:
        print(f"target: {', '.join(f'{name} {value}' for name, value in report['target'].items())}")
    if "patterns" in report:
        print(f"patterns: {', '.join(f'{count} {kind}' for kind, count in report['patterns'].items())}")
    if "recall" in report:
        print(f"here: recall {report['recall']:.3f}, density {report['density']:.3f}")
    held_out = report["held_out"]
    if held_out is None:
        print(f"held-out text: none. {report['reason']}")
    else:
        print(f"held-out text: recall {held_out['recall']:.3f}, density {held_out['density']:.3f}")
    print(report["output"])


def _steps(progress: Progress, text: str):
    return lambda done, total: progress(done, total, text)

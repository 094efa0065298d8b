"""Time attention on your machine: dense kernels, and each strategy stage by stage.

Queries, keys and values are those of a model that reads a text, or come from a file of benchmarks/capture.py. All
candidates run in turn. Times are medians of the repeats, and means over the layers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sparse_prefill.cli.arguments import (
    add_machine,
    add_model,
    add_strategies,
    add_text,
    command_line,
    count,
    load_model,
    read_tokens,
    strategies_of,
    use_machine,
)
from sparse_prefill.cli.output import add_json, print_table
from sparse_prefill.cli.progress import Progress
from sparse_prefill.core.files import check_output
from sparse_prefill.kernel.compiled import check_can_run
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy

DEFAULTS = ("flex_prefill", "mean_slash", "flash_prefill", "xattention", "a_shape")
STAGES = ("estimate", "select", "table", "kernel", "total")
COLUMNS = {
    "name": ("strategy", "{}"),
    "density": ("density", "{:.2f}"),
    "recall": ("recall", "{:.3f}"),
    "oracle density": ("oracle's density", "{:.2f}"),
    **{f"{stage}_ms": (f"{stage}, ms", "{:.1f}") for stage in STAGES},
    "speed-up over sdpa": ("speed-up", "{:.2f}x"),
    "overhead share": ("overhead", "{:.0%}"),
}
Layers = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    of = parser.add_mutually_exclusive_group(required=True)
    add_model(of, required=False)
    of.add_argument("--qkv", type=Path, metavar="FILE", help="captured queries, keys and values")
    add_strategies(parser, ", ".join(DEFAULTS))
    add_text(parser)
    parser.add_argument("--every", type=count, default=3, metavar="N", help="time one layer in N. Default: 3")
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="timed runs of each. Default: 5")
    add_machine(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from sparse_prefill.evaluation.results import origin
    from sparse_prefill.evaluation.timing import mean_comparison

    strategies = strategies_of(options.strategies or DEFAULTS)
    if options.output:
        options.output = check_output(options.output, [options.model, options.qkv, options.text])
    use_machine(options)
    check_can_run()
    with Progress() as progress:
        case, of, layers = (_of_file if options.qkv else _of_model)(options, strategies, progress)
    report = {
        **origin(command_line(options), options.device, **of),
        "dtype": options.dtype,
        "repeats": options.repeats,
        "results": [{"case": case, **mean_comparison(layers, strategies)}],
    }
    text = json.dumps(report, indent=1)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        _print(report["results"][0])
    return 0


def _of_model(
    options: argparse.Namespace, strategies: dict[str, Strategy | Plan], progress: Progress
) -> tuple[str, dict[str, Any], Layers]:
    from sparse_prefill.evaluation.run_times import each_layer
    from sparse_prefill.evaluation.timing import compare_attention

    subject = load_model(options, progress)
    tokens = read_tokens(subject, options.text, options.tokens)
    found = []

    def measure(index, q, k, v, bound, prompt) -> None:
        found.append(compare_attention(q, k, v, bound, repeats=options.repeats, prompt=prompt))

    each_layer(subject, strategies, tokens, measure, every=options.every, on_step=progress)
    of = {"model": subject.name, "text": options.text, "seed": None}  # nothing is drawn at random
    return f"{subject.name}, {options.tokens} tokens", of, found


def _of_file(
    options: argparse.Namespace, strategies: dict[str, Strategy | Plan], progress: Progress
) -> tuple[str, dict[str, Any], Layers]:
    from sparse_prefill.evaluation.captured import read_captured
    from sparse_prefill.evaluation.timing import compare_attention
    from sparse_prefill.plan import with_options

    sparse = {name: with_options(one, min_length=0) for name, one in strategies.items() if isinstance(one, Strategy)}
    plans = [name for name, strategy in strategies.items() if isinstance(strategy, Plan)]
    if plans:
        raise ValueError(f"{plans[0]} is a plan of layers, and a file of tensors has no layer numbers: use --model.")
    captured, of = read_captured(options.qkv)
    layers = list(captured.values())[:: options.every]
    found = []
    for done, qkv in enumerate(layers):
        progress(done, len(layers), f"time {options.qkv.name}")
        q, k, v = (x.to(options.device) for x in qkv)
        found.append(compare_attention(q, k, v, sparse, repeats=options.repeats))
    return options.qkv.stem, of, found


def _print(case: dict[str, Any]) -> None:
    print(
        f"{case['case']}, mean of {case['layers']} layers: SDPA {1e3 * case['sdpa']:.1f} ms, "
        f"dense FlexAttention {1e3 * case['dense flex']:.1f} ms\n"
    )
    rows = [{**row, **{f"{stage}_ms": 1e3 * row[stage] for stage in STAGES}} for row in case["strategies"]]
    print_table(rows, COLUMNS)

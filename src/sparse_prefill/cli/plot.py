"""Draw the results of an evaluation, or the blocks that a strategy keeps in one head of a model.

From results, it draws into a folder every picture that the file has numbers for: the frontier of recall over density,
maps of layers and heads, grids of needles, speed-up over length. For a head, it draws scores, kept blocks and true
attention.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from sparse_prefill.cli.arguments import SPEC, add_machine, add_model, add_text, load_model, number, read_tokens
from sparse_prefill.cli.output import add_json, print_json, shown_from
from sparse_prefill.cli.progress import Progress
from sparse_prefill.core.files import check_folder, check_output
from sparse_prefill.spec import parse_options
from sparse_prefill.strategy import as_strategy

DOTS_PER_INCH = 110
SUFFIXES = (".png", ".svg", ".pdf")
NOT_IN_NAMES = re.compile(r"[^\w.=-]+")  # characters to replace in names of files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("results", type=Path, nargs="?", metavar="RESULTS", help="what `sparse-prefill eval` wrote")
    add_model(of, required=False)
    output = "folder for results, file for a head (.png, .svg or .pdf). Default: next to the results, or in outputs"
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help=output)
    spec = f"{SPEC.partition(', or a plan')[0]}. Default: flex_prefill"
    parser.add_argument("-s", "--strategy", default="flex_prefill", metavar="SPEC", help=spec)
    parser.add_argument("--layer", type=number, default=0, metavar="N", help="of the head, from 0. Default: 0")
    parser.add_argument("--head", type=number, default=0, metavar="N", help="query head, from 0. Default: 0")
    add_text(parser)
    add_machine(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    paths = _draw_results(options) if options.model is None else [_draw_head(options)]
    if options.json:
        print_json({"pictures": [str(path) for path in paths]})
    else:
        print("\n".join(map(str, paths)))
    return 0


def _draw_results(options: argparse.Namespace) -> list[Path]:
    from sparse_prefill.evaluation.results import read_report
    from sparse_prefill.report import figures_of

    results = read_report(options.results)
    folder = options.output or options.results.with_suffix("")
    if folder.is_file() or folder.suffix in SUFFIXES:
        raise ValueError(f"Pictures of results go into a folder: give --output a folder, got {folder}.")
    check_folder(folder)
    paths = []
    with Progress() as progress:
        progress(0, 0, "draw")
        with shown_from(options.results):
            pictures = figures_of(results)
        if not pictures:
            raise ValueError(f"{options.results} has nothing to draw: no rows, no grid of depths, no lengths.")
        folder.mkdir(parents=True, exist_ok=True)
        for done, picture in enumerate(pictures):
            name = f"{picture.kind} {picture.row}".strip()
            progress(done, len(pictures), f"draw {name}")
            paths.append(folder / f"{NOT_IN_NAMES.sub('_', name).strip('_')}.png")
            picture.figure.savefig(paths[-1], dpi=DOTS_PER_INCH)
    return paths


def _draw_head(options: argparse.Namespace) -> Path:
    from matplotlib import rc_context

    from sparse_prefill.calibration import LayerInputs, observe
    from sparse_prefill.estimators import TrueMass
    from sparse_prefill.models.at_length import sparse_at_length
    from sparse_prefill.plotting import head_map

    strategy = as_strategy(parse_options(options.strategy))
    path = options.output or Path("outputs") / f"{strategy.name}_layer{options.layer}_head{options.head}.png"
    if path.suffix not in SUFFIXES:
        raise ValueError(f"The picture of a head is one of {', '.join(SUFFIXES)}, got --output {path}.")
    target = check_output(path, [options.model, options.text])
    with Progress() as progress:
        subject = load_model(options, progress)
        for name, index, number_of in (("layer", options.layer, subject.layers), ("head", options.head, subject.heads)):
            if index >= number_of:
                raise ValueError(f"--{name} must be in [0, {number_of - 1}] for {subject.name}, got {index}.")
        tokens = read_tokens(subject, options.text, options.tokens)
        strategy = sparse_at_length(strategy, tokens.shape[1], subject.device)
        tables: list[torch.Tensor] = []
        title = f"{options.strategy}, layer {options.layer}, head {options.head}"

        def inspect(index: int, inputs: LayerInputs) -> None:
            if inputs.layer != options.layer:
                return
            q, k, prompt, head = inputs.q, inputs.k, inputs.prompt, options.head
            key_head = head // (q.shape[1] // k.shape[1])
            shape = (1, q.shape[1], prompt.n_q, prompt.n_k)
            scores = inputs.strategy.score_table(inputs.strategy.score(q, k, prompt), prompt)
            keep = inputs.strategy.keep(q, k, prompt)
            if reason := inputs.strategy.dense_reason(prompt, q.device):
                nonlocal title
                title, keep = f"{title}, dense ({reason})", prompt.visible(q.device)
            mass = TrueMass()(q[:, [head]], k[:, [key_head]], prompt)
            tables.extend([scores.expand(shape)[0, head].float(), keep.expand(shape)[0, head], mass[0, 0]])

        with torch.inference_mode():
            observe(subject, strategy, [tokens], inspect, lambda done, total: progress(done, total, "read the text"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"text.parse_math": False}):
        scores, keep, mass = tables
        figure = head_map(scores, keep, mass, title)
    figure.savefig(target, dpi=DOTS_PER_INCH)
    return path

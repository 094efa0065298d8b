"""Time whole prefill of a decoder on a GPU: dense by SDPA, sparse, and sparse with CUDA graphs.

    python benchmarks/gpu_model.py --json benchmarks/results/gpu_model.json
    python benchmarks/gpu_model.py --device cpu --shape tiny --lengths 600 --repeats 1   # a smoke test

Needs torch, einops and transformers; nothing is downloaded. Weights are random, so the density of
data-dependent strategies says nothing about a trained model. The default strategies keep a number of blocks that
depends only on the length. The timed prefill returns the logits of the last token and all keys and values.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

try:
    import sparse_prefill  # noqa: F401
except ModuleNotFoundError:  # a checkout without an installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import result_file

import sparse_prefill as sp
from sparse_prefill.evaluation.results import origin
from sparse_prefill.evaluation.steps import sparse_at_any_length
from sparse_prefill.models.transformers import sparse
from sparse_prefill.spec import parse_strategy
from sparse_prefill.strategy import Strategy

SHAPES = {  # hidden size, feed-forward size, layers, query heads, key heads
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8),
    "tiny": (64, 128, 4, 4, 2),
}
LENGTHS = [8192, 32768, 131072]
STRATEGIES = ["minference", "a_shape"]
SEED = 0


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    command = result_file.command(__file__, argv)
    report = {
        **origin(command, args.device, model=f"{args.shape}, random weights", text="random tokens", seed=SEED),
        "dtype": "bf16",
        "repeats": args.repeats,
        "results": [],
    }
    model = made(args.shape, args.device)
    for tokens in args.lengths:
        report["results"].append(measure(model, tokens, args))
        print(json.dumps(report["results"][-1]), flush=True)
        if args.json:
            result_file.write(args.json, report)
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3.1-8B")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, metavar="NAME[:OPTION=VALUE,…]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way, in turn, after a warm-up")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device: name another one with --device")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    return args


def made(shape: str, device: str) -> nn.Module:
    hidden, inner, layers, heads, key_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=1 << 20,
        rope_theta=500000.0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


@torch.inference_mode()
def measure(model: nn.Module, tokens: int, args: argparse.Namespace) -> dict:
    """Median seconds, peak memory and, for strategies, density of each way; the ways run in turn."""
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(3, 1024, (1, tokens), generator=generator).to(args.device)
    ways: dict[str, Callable] = {"dense": nullcontext}
    strategies = {spec: sparse_at_any_length(parse_strategy(spec)) for spec in args.strategies}
    for spec, strategy in strategies.items():
        ways[spec] = lambda strategy=strategy: sparse(model, strategy, stats=False)
        if prompt.is_cuda:
            graphs = sp.CudaGraphs()
            ways[f"{spec}, CUDA graphs"] = lambda strategy=strategy, graphs=graphs: replaying(model, strategy, graphs)
    taken: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float | None] = {}
    logits: dict[str, Tensor] = {}
    for repeat in range(args.repeats + 1):
        for way, opened in ways.items():
            if prompt.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            with opened():
                took, logits[way] = timed(model, prompt)
            peaks[way] = torch.cuda.max_memory_allocated() / 2**30 if prompt.is_cuda else None
            taken[way] += [took] if repeat else []
    rows = []
    for way in ways:
        seconds = sorted(taken[way])[len(taken[way]) // 2]
        row = {"way": way, "seconds": seconds, "peak_gib": peaks[way]}
        row["against dense"] = sorted(taken["dense"])[len(taken["dense"]) // 2] / seconds
        if way in strategies:
            with sparse(model, strategies[way]) as stats:
                timed(model, prompt)
            row["density"] = stats.density
        if way.endswith("graphs"):
            row["equal to that without"] = torch.equal(logits[way], logits[way.partition(", ")[0]])
        rows.append(row)
    return {"tokens": tokens, "ways": rows}


@contextmanager
def replaying(model: nn.Module, strategy: Strategy, graphs: sp.CudaGraphs) -> Iterator[None]:
    with sparse(model, strategy, stats=False), graphs:
        yield


def timed(model: nn.Module, prompt: Tensor) -> tuple[float, Tensor]:
    if prompt.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, out.logits


if __name__ == "__main__":
    main()

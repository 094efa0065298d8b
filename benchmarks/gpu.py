"""Time prefill attention on a GPU, 4K to 1M tokens at the shapes of two models: the best dense kernel and strategies.

Needs only torch and einops, from a checkout; one command, within the minutes that it is given:

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --lengths 512 1024 --strategies a_shape --repeats 1   # to see that it runs

Queries, keys and values are synthetic: heads of known kinds in equal parts, see known_heads.py. With --qkv, those of a
real model (benchmarks/capture.py) are timed, too. Shorter prompts come first; the report names the prompts that no time
was left for. Results are written after each prompt.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

try:
    import sparse_prefill  # noqa: F401
except ModuleNotFoundError:  # a checkout without an installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import result_file
from kernel_variants import first_line, of_options, of_orders
from known_heads import KINDS, SEED, structured
from timers import in_a_row, replayed, seconds

import sparse_prefill as sp
from sparse_prefill.estimators.true_mass import true_mass
from sparse_prefill.evaluation.blocks import oracle_density, recall, spread_blocks
from sparse_prefill.evaluation.captured import Layer, read_captured
from sparse_prefill.evaluation.profiling import ceilings
from sparse_prefill.evaluation.results import origin
from sparse_prefill.evaluation.steps import sparse_at_any_length
from sparse_prefill.evaluation.timing import STAGES, dense_kernels, wait
from sparse_prefill.kernel.block_lists import block_tables
from sparse_prefill.kernel.flex import attend
from sparse_prefill.spec import parse_strategy

SHAPES = {"Llama-3.1-8B": (32, 8, 128), "Qwen2.5-7B": (28, 4, 128)}  # query heads, key heads, head dim
LENGTHS = [4096, 8192, 32768, 131072, 524288, 1048576]
STRATEGIES = [
    "flex_prefill",
    "flex_prefill:gamma=0.95",
    "flex_prefill:gamma=0.975",
    "xattention",
    "xattention:stride=16,threshold=0.95",
    "xattention:stride=16,threshold=0.97",
    "flash_prefill",
    "flash_prefill:alpha=0.02",
    "prism",
    "mean_pool",
    "mean_slash",
    "mean_slash:threshold=0.004",
    "minference",
    "a_shape",
]
RECALL_UP_TO = 131072  # tokens; beyond, rows of true attention don't fit beside the rest
DENSE_UP_TO = 131072  # tokens; beyond, dense attention of one key head's queries is timed, and told times key heads
OPTIONS_AT = [32768]  # tokens; each set of options compiles a kernel
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    begin = time.monotonic()
    command = result_file.command(__file__, argv)
    report = {
        **origin(command, args.device, model=", ".join(args.shapes), text="synthetic heads", seed=SEED),
        "dtype": args.dtype,
        "repeats": args.repeats,
        "kinds of heads": list(KINDS),
        "ceilings": ceilings([DTYPES[args.dtype]], args.device),
        "results": [],
        "left out": [],
    }
    for name, of, make in cases(args):
        if time.monotonic() - begin > 60 * args.minutes:
            report["left out"].append(name)
            continue
        found = {"case": name, **of, **measure(*make(), args)}
        report["results"].append(found)
        print(line(found), flush=True)
        if args.json:
            result_file.write(args.json, report)
    if report["left out"]:
        print("no time left for:", ", ".join(report["left out"]))
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, metavar="NAME[:OPTION=VALUE,…]")
    parser.add_argument("--qkv", type=Path, help="file of captured q, k, v; timed first")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=7, help="begin no prompt after this many")
    parser.add_argument(
        "--options-at", type=int, nargs="*", default=OPTIONS_AT, help="tokens at which kernel options are tried"
    )
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device: name another one with --device")
    return args


def cases(args: argparse.Namespace) -> list[tuple[str, dict, Callable[[], Layer]]]:
    """Names of prompts, what captured ones are of, and what makes their q [1, Hq, N, D], k and v [1, Hkv, N, D]."""
    dtype = DTYPES[args.dtype]
    found: list[tuple[str, dict, Callable[[], Layer]]] = []
    if args.qkv:
        layers, of = read_captured(args.qkv)
        for layer, qkv in layers.items():
            make = partial(moved, qkv, args.device, dtype)
            found.append((f"{args.qkv.stem}, layer {layer}", of, make))
    for tokens in sorted(args.lengths):
        for shape in args.shapes:
            make = partial(structured, tokens, *SHAPES[shape], dtype=dtype, device=args.device)
            found.append((f"{shape}, {tokens} tokens", {"model": shape}, make))
    return found


def moved(qkv: Layer, device: str, dtype: torch.dtype) -> Layer:
    q, k, v = (x.to(device, dtype) for x in qkv)
    return q, k, v


@torch.inference_mode()
def measure(q: Tensor, k: Tensor, v: Tensor, args: argparse.Namespace) -> dict:
    """Seconds of the dense kernels, and of each strategy its stages, density, recall and peak memory."""
    tokens = q.shape[2]
    prompt = sp.Prompt(q_len=tokens)
    repeats = args.repeats if tokens <= RECALL_UP_TO else 1
    if tokens <= DENSE_UP_TO:
        dense = {name: seconds(run, q, repeats) for name, run in dense_candidates(q, k, v).items()}
    else:
        one = dense_candidates(q[:, : q.shape[1] // k.shape[1]], k[:, :1], v[:, :1])
        dense = {name: k.shape[1] * seconds(run, q, repeats) for name, run in one.items()}
    if tokens <= DENSE_UP_TO:
        inputs = sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt)
        everything = block_tables(prompt.visible(q.device).expand(1, q.shape[1], -1, -1), prompt)
        dense["dense flex"] = seconds(lambda: attend(inputs, everything), q, repeats)
        del everything
    best = min(value for name, value in dense.items() if name != "dense flex")
    blocks = spread_blocks(prompt.n_q, 6)
    mass = true_mass(q, k, prompt, blocks) if tokens <= RECALL_UP_TO else None
    rows = []
    for spec in args.strategies:
        try:
            rows.append({"name": spec, **of_strategy(spec, q, k, v, prompt, repeats, mass, blocks, best)})
        except (RuntimeError, ValueError) as error:  # out of memory, or a kernel that doesn't compile: told, not hidden
            rows.append({"name": spec, "error": first_line(error)})
            gc.collect()
    tensors_gib = (2 * q.nbytes + k.nbytes + v.nbytes) / 2**30  # the output is as large as q
    if tokens <= DENSE_UP_TO:
        dense["default, in a row"] = in_a_row(dense_candidates(q, k, v)["default"], q, repeats)
    found = {"tokens": tokens, "tensors_gib": tensors_gib, "dense": dense, "best dense": best, "strategies": rows}
    if tokens in args.options_at:
        keep = parse_strategy(args.strategies[0]).keep(q, k, prompt)
        tables = block_tables(keep.expand(1, q.shape[1], -1, -1), prompt)
        found["kernel options"] = of_options(q, k, v, tables, prompt, repeats)
        found["order of rows"] = of_orders(q, k, v, tables, prompt.block_size, repeats)
    return found


def of_strategy(spec, q, k, v, prompt, repeats, mass, blocks, best) -> dict:
    strategy = sparse_at_any_length(parse_strategy(spec))

    def run() -> Tensor:
        return sp.sparse_attention(q, k, v, strategy, prompt=prompt)

    def search() -> Tensor:
        """What comes before the kernel."""
        return block_tables(strategy.keep(q, k, prompt).expand(1, q.shape[1], -1, -1), prompt).full_counts

    if q.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    run()  # compiles
    peak = torch.cuda.max_memory_allocated() / 2**30 if q.is_cuda else None
    total = seconds(run, q, repeats)
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin  # until all is launched
    wait(q)
    kept: list[Tensor] = []
    with sp.record(inspect=lambda call, seen, prompt: kept.append(seen.keep)) as calls:
        run()
    visible = [int(sp.Prompt(call.q_len, call.kv_len, strategy.block_size).visible().sum()) for call in calls]
    density = sum(call.density * n for call, n in zip(calls, visible, strict=True)) / sum(visible)  # [1, heads]
    row = {
        "seconds": total,
        "host": host,
        "parts": len(calls),  # that very long prompts are taken in
        **{stage: sum(call.seconds[stage] for call in calls) for stage in STAGES},
        "density": float(density.mean()),
        "density by kind": [
            round(float(density[0, i :: len(KINDS)].mean()), 4) for i in range(min(len(KINDS), q.shape[1]))
        ],
        "against best dense": best / total,
        "peak_gib": peak,
    }
    if q.is_cuda and mass is not None:
        row["graph"] = replayed(run, q, repeats)
        row["graph against best dense"] = best / row["graph"]
        row["search graph"] = replayed(search, q, repeats)
        with sp.CudaGraphs():  # whose tensors a call's are copied to
            run(), run()  # runs as usual, and is captured
            row["CudaGraphs"] = seconds(run, q, repeats)
    shipped = parse_strategy(spec)
    if shipped.dense_reason(prompt, q.device):  # what users get who don't set min_length
        row["short"] = in_a_row(lambda: sp.sparse_attention(q, k, v, shipped, prompt=prompt), q, repeats)
    if mass is not None:
        row["recall"] = float(recall(mass, kept[0], blocks).mean())
        row["oracle density"] = oracle_density(mass, row["recall"], prompt, blocks)
    return row


def dense_candidates(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """SDPA's kernels, and FlashAttention 3 and 4 where they are installed; theirs are [B, N, H, D]."""
    found = dense_kernels(q, k, v)
    bnhd = [x.transpose(1, 2) for x in (q, k, v)]
    for name, module in (("flash-attention 3", "flash_attn_interface"), ("flash-attention 4", "flash_attn.cute")):
        try:
            function = __import__(module, fromlist=["flash_attn_func"]).flash_attn_func
            function(*bnhd, causal=True)
        except (ImportError, AttributeError, RuntimeError):
            continue
        found[name] = partial(function, *bnhd, causal=True)
    return found


def line(found: dict) -> str:
    lines = [f"{found['case']}: " + ", ".join(f"{name} {1e3 * x:.2f} ms" for name, x in found["dense"].items())]
    for row in found["strategies"]:
        if "error" in row:
            lines.append(f"  {row['name']:28} {row['error']}")
            continue
        stages = " + ".join(f"{1e3 * row[stage]:.2f}" for stage in STAGES) + f"; host {1e3 * row['host']:.2f}"
        kept = f"recall {row['recall']:.3f}, oracle {row['oracle density']:.3f}, " if "recall" in row else ""
        graph = f"graph {1e3 * row['graph']:.2f} ms {row['graph against best dense']:.2f}x, " if "graph" in row else ""
        kept += f"CudaGraphs {1e3 * row['CudaGraphs']:.2f} ms, " if "CudaGraphs" in row else ""
        kept += graph + (f"by default {1e3 * row['short']:.2f} ms, " if "short" in row else "")
        lines.append(
            f"  {row['name']:28} {1e3 * row['seconds']:9.2f} ms ({stages}) {row['against best dense']:6.2f}x   {kept}"
            f"density {row['density']:.3f}, {row['peak_gib'] or 0:.2f} GiB"
        )
    for row in found.get("kernel options", []) + found.get("order of rows", []):
        tried = (
            f"rows of blocks {row['order']}"
            if "order" in row
            else f"kernel with {row['options'] or 'the options of the library'}"
        )
        lines.append(f"  {tried}: " + (row["error"] if "error" in row else f"{1e3 * row['seconds']:.2f} ms"))
    return "\n".join(lines)


if __name__ == "__main__":
    main()

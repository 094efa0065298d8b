"""Find the length from which each strategy is faster than dense attention, for the default of its ``min_length``.

Times prefixes of captured queries, keys and values: a prefix equals the capture of a shorter prompt. From a checkout:

    python benchmarks/crossover.py --qkv .cache/smollm2_8k.pt --json outputs/crossover.json

All candidates run in turn, repeat by repeat, and medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import sparse_prefill as sp
except ModuleNotFoundError:  # a checkout without an installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    import sparse_prefill as sp

sys.path.insert(0, str(Path(__file__).resolve().parent))
import result_file
from attention import DTYPES

from sparse_prefill.evaluation.captured import read_captured
from sparse_prefill.evaluation.results import origin
from sparse_prefill.evaluation.timing import wait

LENGTHS = [1024, 2048, 3072, 4096, 6144]
FASTER = 1.01  # times as fast as SDPA; smaller differences are noise


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qkv", type=Path, required=True, help="file of captured q, k, v: benchmarks/capture.py")
    parser.add_argument("--strategies", nargs="+", default=[n for n in sp.list_strategies() if n != "dense"])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--every", type=int, default=2, help="one captured layer in this many")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    captured, of = read_captured(args.qkv)
    layers = [
        tuple(x.to(args.device, DTYPES[args.dtype]) for x in qkv) for qkv in list(captured.values())[:: args.every]
    ]
    strategies = {name: sp.get_strategy(name, min_length=0) for name in args.strategies}
    command = result_file.command(__file__, argv)
    report = {
        **origin(command, args.device, **of),
        "dtype": args.dtype,
        "repeats": args.repeats,
        "layers": len(layers),
        "lengths": args.lengths,
        "sdpa_ms": [],
        "strategies": {name: {"speedup": []} for name in strategies},
    }
    for tokens in args.lengths:
        sdpa, of_strategies = measure([[x[:, :, :tokens] for x in qkv] for qkv in layers], strategies, args.repeats)
        report["sdpa_ms"].append(round(1e3 * sdpa, 2))
        for name, seconds in of_strategies.items():
            report["strategies"][name]["speedup"].append(round(sdpa / seconds, 3))
        print(f"{tokens:6} " + " ".join(f"{n}={sdpa / s:.2f}" for n, s in of_strategies.items()), file=sys.stderr)
    for row in report["strategies"].values():
        row["crossover"] = first_faster(args.lengths, row["speedup"])
    for name, row in report["strategies"].items():
        print(f"{name:20} {row['crossover'] or 'none':>6}  {' '.join(f'{x:5.2f}' for x in row['speedup'])}")
    if args.json:
        result_file.write(args.json, report)
    return report


def measure(
    layers: list[list[Tensor]], strategies: dict[str, sp.Strategy], repeats: int
) -> tuple[float, dict[str, float]]:
    """Mean over the layers of the median seconds of SDPA and of each strategy."""
    runs = {
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        **{n: lambda q, k, v, s=s: sp.sparse_attention(q, k, v, s) for n, s in strategies.items()},
    }
    means = dict.fromkeys(runs, 0.0)
    with torch.inference_mode():
        for qkv in layers:
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for repeat in range(repeats + 1):  # the first one warms up
                for name, run in runs.items():
                    wait(qkv[0])
                    begin = time.perf_counter()
                    run(*qkv)
                    wait(qkv[0])
                    if repeat:
                        seconds[name].append(time.perf_counter() - begin)
            for name, values in seconds.items():
                means[name] += statistics.median(values) / len(layers)
    return means.pop("sdpa"), means


def first_faster(lengths: list[int], speedup: list[float]) -> int | None:
    """The shortest length from which a strategy was always faster than dense attention, or None."""
    found = None
    for tokens, ratio in reversed(list(zip(lengths, speedup, strict=True))):
        if ratio < FASTER:
            break
        found = tokens
    return found


if __name__ == "__main__":
    main()

"""Time attention: dense SDPA, dense FlexAttention, and each strategy split into its stages.

Needs only torch and einops, on a CPU or a CUDA GPU, from a checkout:

    python benchmarks/attention.py                                     # random q, k, v
    python benchmarks/attention.py --qkv .cache/smollm2_8k.pt          # captured ones: benchmarks/capture.py
    python benchmarks/attention.py --lengths 8192 32768 --heads 32 8 128 --strategies flex_prefill a_shape:local=4096
    python benchmarks/attention.py --qkv .cache/smollm2_8k.pt --lengths 4096 8000 --profile

With --profile, what each stage does at least stands beside its time, and what the machine reaches at best.
All candidates run in turn, repeat by repeat, and medians are shown, so that a change in the machine's load meets all of
them alike. Random q and k attend almost evenly, so their densities say nothing about real prompts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

try:
    import sparse_prefill  # noqa: F401
except ModuleNotFoundError:  # a checkout without an installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import result_file

from sparse_prefill.evaluation.captured import Layer, read_captured
from sparse_prefill.evaluation.growth import growth_at_recalls
from sparse_prefill.evaluation.profiling import ceilings, growth, profile_attention, tables
from sparse_prefill.evaluation.results import origin
from sparse_prefill.evaluation.steps import sparse_at_any_length
from sparse_prefill.evaluation.timing import STAGES, compare_attention, mean_comparison
from sparse_prefill.spec import parse_strategy

Case = tuple[str, list[Layer]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEED = 0  # of random prompts


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    strategies = {spec: sparse_at_any_length(parse_strategy(spec)) for spec in args.strategies}
    command = result_file.command(__file__, argv)
    found, of = cases(args)
    report = {**origin(command, args.device, **of), "repeats": args.repeats, "results": []}
    for name, inputs in found:
        q, k, _ = inputs[0]
        print(f"{name}: {len(inputs)} x q {list(q.shape)}, k {list(k.shape)}, {q.dtype}", file=sys.stderr)
        if args.profile:
            dtypes = dict.fromkeys([q.dtype, torch.float32])  # a CPU may compute half precision in fp32
            report.setdefault("ceilings", {}).update(ceilings(list(dtypes), q.device))
            result = profile_attention(inputs, strategies, repeats=args.repeats)
        else:
            with torch.inference_mode():
                layers = [compare_attention(*qkv, strategies, repeats=args.repeats) for qkv in inputs]
            result = mean_comparison(layers, strategies)
        report["results"].append({"case": name, "tokens": q.shape[2], "dtype": str(q.dtype)[6:], **result})
    if args.profile and len(report["results"]) > 1:
        report["exponents"] = growth(report["results"][0], report["results"][-1])
    if len(report["results"]) > 1 and len(strategies) > len({name.partition(":")[0] for name in strategies}):
        report["growth"] = growth_at_recalls(report["results"][0], report["results"][-1])
    print(markdown(report))
    if args.json:
        result_file.write(args.json, report)
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cases(parser, repeats=7)
    parser.add_argument("--strategies", nargs="+", default=["flex_prefill", "a_shape"], metavar="NAME[:OPTION=VALUE,…]")
    parser.add_argument("--profile", action="store_true", help="what each stage does, and the machine's best rates")
    return parser.parse_args(argv)


def add_cases(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """The arguments that ``cases`` reads, and those of how often and where they are timed."""
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        help="tokens: of the random prompts, 4096 and 8192 if not given, or of the captured ones' first parts",
    )
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], metavar=("HQ", "HKV", "D"))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="bf16, or the captured one, if not given")
    parser.add_argument("--qkv", type=Path, help="file of captured q, k, v; replaces the random prompts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--every", type=int, default=1, help="one captured layer in this many")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", help="file for the results")


def cases(args: argparse.Namespace) -> tuple[list[Case], dict[str, Any]]:
    """Named lists of q [B, Hq, N, D], k and v [B, Hkv, N, D], one a layer, and their model, text and seed."""
    found: list[Case] = []
    if args.qkv:
        captured, of = read_captured(args.qkv)
        layers = list(captured.values())[:: args.every]
        for dtype in args.dtypes or [None]:
            for n in args.lengths or [None]:
                name = " ".join([args.qkv.stem, *([dtype] if dtype else []), *([str(n)] if n else [])])
                kind = DTYPES[dtype] if dtype else None
                found.append(
                    (name, [tuple(x[:, :, :n].contiguous().to(args.device, kind) for x in qkv) for qkv in layers])
                )
        return found, of
    hq, hkv, d = args.heads
    for dtype in args.dtypes or ["bf16"]:
        for n in args.lengths or [4096, 8192]:
            torch.manual_seed(SEED)
            shapes = ((1, hq, n, d), (1, hkv, n, d), (1, hkv, n, d))
            qkv = tuple(torch.randn(s, dtype=DTYPES[dtype], device=args.device) for s in shapes)
            found.append((f"random {dtype} {n}", [qkv]))
    return found, {"model": None, "text": None, "seed": SEED}


def markdown(report: dict) -> str:
    lines = [f"{report['device']}, {report['threads']} threads, torch {report['torch']}, {report['date'][:10]}", ""]
    if "ceilings" in report:
        lines += ["at best: " + ", ".join(f"{name} {rate:.1f}" for name, rate in report["ceilings"].items()), ""]
    for case in report["results"]:
        lines += [
            f"**{case['case']}**, mean of {case['layers']} layers: SDPA {ms(case['sdpa'])} ms, "
            f"dense flex {ms(case['dense flex'])} ms",
            "",
        ]
        if "ceilings" in report:
            lines += [tables(case), ""]
            continue
        lines += [
            "| strategy | density | recall | oracle density | estimate | select | table | kernel | total ms | vs SDPA "
            "| kernel / (density x dense flex) | overhead share |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in case["strategies"]:
            times = " | ".join(ms(row[stage]) for stage in (*STAGES, "total"))
            lines.append(
                f"| {row['name']} | {row['density']:.3f} | {row['recall']:.3f} | {row['oracle density']:.3f} | {times} "
                f"| {row['speed-up over sdpa']:.2f}x | {row['kernel / (density x dense flex)']:.2f} "
                f"| {row['overhead share']:.0%} |"
            )
        lines.append("")
    if "exponents" in report:
        told = ", ".join(f"{name} {exponent:.2f}" for name, exponent in report["exponents"].items())
        lines.append(f"time from the first to the last length grows with the power: {told}")
    return "\n".join(lines)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


if __name__ == "__main__":
    main()

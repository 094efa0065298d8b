"""Time attention: dense SDPA, dense FlexAttention, and each strategy split into its stages.

Needs torch and einops alone, on a CPU or a CUDA GPU, from a checkout:

    python benchmarks/attention.py                                     # random q, k, v
    python benchmarks/attention.py --qkv .cache/smollm2_8k.pt          # captured ones: benchmarks/capture.py
    python benchmarks/attention.py --lengths 8192 32768 --heads 32 8 128 --strategies flex_prefill a_shape:local=4096

All candidates run in turn, repeat by repeat, and medians are shown, so that a change in the machine's load meets all of
them alike. Random q and k attend almost evenly, so their densities say nothing about real prompts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import sparse_prefill as sp
except ModuleNotFoundError:  # a checkout without an installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    import sparse_prefill as sp
from sparse_prefill.block_mask import block_tables
from sparse_prefill.evaluation import oracle_density, recall, true_mass
from sparse_prefill.kernel import attend

STAGES = ("estimate", "select", "table", "kernel")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    strategies = {spec: strategy_of(spec) for spec in args.strategies}
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/attention.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "repeats": args.repeats,
        "results": [],
    }
    for name, inputs in cases(args):
        print(f"{name}: {len(inputs)} x q {list(inputs[0][0].shape)}, k {list(inputs[0][1].shape)}", file=sys.stderr)
        with torch.inference_mode():
            layers = [measure(*qkv, list(strategies.values()), args.repeats) for qkv in inputs]
        report["results"].append({"case": name, **summary(layers, strategies)})
    print(markdown(report))
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192], help="tokens of the random prompts")
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], metavar=("HQ", "HKV", "D"))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--strategies", nargs="+", default=["flex_prefill", "a_shape"], metavar="NAME[:OPTION=VALUE,…]")
    parser.add_argument("--qkv", nargs="*", default=[], help="files of captured q, k, v; replace the random prompts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", help="file for the results")
    return parser.parse_args(argv)


def strategy_of(spec: str) -> sp.Strategy:
    """A strategy from "name" or "name:option=value,option=value", the values written as in JSON."""
    name, _, options = spec.partition(":")
    pairs = (option.split("=") for option in options.split(",") if option)
    return sp.get_strategy(name, **{key: json.loads(value) for key, value in pairs})


def cases(args: argparse.Namespace) -> list[tuple[str, list[tuple[Tensor, Tensor, Tensor]]]]:
    """Named lists of q [B, Hq, N, D], k and v [B, Hkv, N, D]: one a layer."""
    found = []
    for path in args.qkv:
        layers = torch.load(path, weights_only=True)["layers"]
        found.append((Path(path).stem, [tuple(x.to(args.device) for x in qkv) for qkv in layers.values()]))
    if not args.qkv:
        hq, hkv, d = args.heads
        for dtype in args.dtypes:
            for n in args.lengths:
                torch.manual_seed(0)
                shapes = ((1, hq, n, d), (1, hkv, n, d), (1, hkv, n, d))
                qkv = tuple(torch.randn(s, dtype=DTYPES[dtype], device=args.device) for s in shapes)
                found.append((f"random {dtype} {n}", [qkv]))
    return found


def measure(q: Tensor, k: Tensor, v: Tensor, strategies: list[sp.Strategy], repeats: int) -> dict:
    """Seconds of every candidate, and what each strategy kept."""
    prompt = sp.Prompt(q_len=q.shape[2], kv_len=k.shape[2])
    everything = block_tables(prompt.visible(q.device).expand(1, q.shape[1], -1, -1), prompt)
    runs: dict[str, Callable[[], object]] = {
        **{f"sdpa {name}": run for name, run in dense_kernels(q, k, v).items()},
        "dense flex": lambda: attend(q, k, v, everything, prompt),
    }
    for i, strategy in enumerate(strategies):
        runs[f"{i} total"] = lambda strategy=strategy: sp.sparse_attention(q, k, v, strategy)
        runs[f"{i} stages"] = lambda strategy=strategy: recorded(q, k, v, strategy)
    for run in runs.values():  # compile and warm up
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wait(q)
            begin = time.perf_counter()
            result = run()
            wait(q)
            seconds[name].append(time.perf_counter() - begin)
            if name.endswith("stages"):
                stages[name].append(result)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    found = {
        "sdpa": min(value for name, value in median.items() if name.startswith("sdpa")),
        "dense flex": median["dense flex"],
        "strategies": [],
    }
    blocks = sampled_blocks(prompt.n_q)
    mass = true_mass(q, k, prompt, blocks)
    for i, strategy in enumerate(strategies):
        keep = strategy.keep(q, k)
        kept = float(recall(mass, keep, blocks).mean())
        found["strategies"].append(
            {
                "total": median[f"{i} total"],
                **{s: statistics.median(run.get(s, 0.0) for run in stages[f"{i} stages"]) for s in STAGES},
                "density": float(sp.evaluation.density(keep, prompt).mean()),
                "recall": kept,
                "oracle density": oracle_density(mass, kept, prompt, blocks),
            }
        )
    return found


def dense_kernels(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Causal SDPA: what torch chooses, and on a GPU each fast kernel that takes the inputs."""

    def sdpa(backend: SDPBackend | None = None) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    kernels: dict[str, Callable[[], Tensor]] = {"default": sdpa}
    if q.is_cuda:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            try:
                sdpa(backend)
            except RuntimeError:  # not for these inputs, or not in this build
                continue
            kernels[backend.name.lower()] = lambda backend=backend: sdpa(backend)
    return kernels


def recorded(q: Tensor, k: Tensor, v: Tensor, strategy: sp.Strategy) -> dict[str, float]:
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, strategy)
    return calls[0].seconds


def sampled_blocks(n: int, count: int = 12) -> list[int]:
    """Query blocks spread evenly over a prompt, the last one included."""
    return sorted({round((i + 1) * n / count) - 1 for i in range(count)} & set(range(n)))


def summary(layers: list[dict], strategies: dict[str, sp.Strategy]) -> dict:
    """Means over the layers, and the ratios that they give."""
    sdpa = statistics.mean(layer["sdpa"] for layer in layers)
    flex = statistics.mean(layer["dense flex"] for layer in layers)
    rows = []
    for i, (spec, strategy) in enumerate(strategies.items()):
        of_layers = [layer["strategies"][i] for layer in layers]
        row = {key: statistics.mean(x[key] for x in of_layers) for key in of_layers[0]}
        row["speed-up over sdpa"] = sdpa / row["total"]
        row["kernel / (density x dense flex)"] = row["kernel"] / (row["density"] * flex)
        row["overhead share"] = (row["estimate"] + row["select"] + row["table"]) / row["total"]
        rows.append({"name": spec, "strategy": repr(strategy), **row})
    return {"layers": len(layers), "sdpa": sdpa, "dense flex": flex, "strategies": rows}


def markdown(report: dict) -> str:
    lines = [f"{report['device']}, {report['threads']} threads, torch {report['torch']}, {report['date'][:10]}", ""]
    for case in report["results"]:
        lines += [
            f"**{case['case']}**, mean of {case['layers']} layers: SDPA {ms(case['sdpa'])} ms, "
            f"dense flex {ms(case['dense flex'])} ms",
            "",
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
    return "\n".join(lines)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

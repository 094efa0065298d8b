"""Time other implementations of prefill attention on the same tensors, those that are installed.

    python benchmarks/peers.py                                   # random q, k, v
    python benchmarks/peers.py --qkv .cache/smollm2_8k.pt --json outputs/peers.json
    python benchmarks/peers.py --device cuda --lengths 32768 131072 --heads 32 8 128

Nothing of theirs is part of this repository: each peer is called through its public function, with the settings that
its authors recommend, and what isn't installed is listed as such. Candidates run in turn, and medians are compared.
Tensors are brought into the layout of a peer, and key heads repeated for those that don't take fewer of them than query
heads, before the clock starts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

try:
    import sparse_prefill as sp
except ModuleNotFoundError:  # a checkout without an installation
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    import sparse_prefill as sp

sys.path.insert(0, str(Path(__file__).resolve().parent))
import result_file
from attention import add_cases, cases

from sparse_prefill.evaluation.results import origin
from sparse_prefill.evaluation.steps import sparse_at_any_length
from sparse_prefill.evaluation.timing import dense_kernels, wait
from sparse_prefill.kernel.block_lists import block_tables
from sparse_prefill.kernel.flex import attend
from sparse_prefill.spec import parse_strategy

Run = Callable[[], Tensor]  # to [B, Hq, N, D]
STRATEGIES = ["flex_prefill:gamma=0.95", "mean_slash", "xattention", "flash_prefill", "minference", "prism", "a_shape"]
BLOCK = 128


# Peers: each takes q [1, Hq, N, D] and k, v [1, Hkv, N, D], and returns what is timed.


def flash_attention(module: str, q: Tensor, k: Tensor, v: Tensor) -> Run:
    function = import_module(module).flash_attn_func
    bnhd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]

    def run() -> Tensor:
        out = function(*bnhd, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def flex_prefill(q: Tensor, k: Tensor, v: Tensor) -> Run:
    function = import_module("flex_prefill").flex_prefill_attention
    bnhd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return lambda: function(*bnhd, gamma=0.9, tau=0.1, min_budget=512, block_size=BLOCK).transpose(1, 2)


def x_attention(q: Tensor, k: Tensor, v: Tensor) -> Run:
    function = import_module("xattn.src.Xattention").Xattention_prefill
    k, v = repeated(q, k, v)
    return lambda: function(q, k, v, stride=8, threshold=0.9, block_size=BLOCK)


def minference(q: Tensor, k: Tensor, v: Tensor, verticals: int = 1000, slashes: int = 6096) -> Run:
    """Its kernel for vertical and slash lines, which are chosen as its paper says: by the last 64 queries."""
    function = import_module("minference").vertical_slash_sparse_attention
    k, v = repeated(q, k, v)
    tokens, last = q.shape[2], min(64, q.shape[2])
    keys = torch.arange(tokens, device=q.device)
    distance = keys[-last:, None] - keys  # [last, N]

    def run() -> Tensor:
        logits = (q[:, :, -last:] @ k.mT).float() * q.shape[3] ** -0.5
        mass = logits.masked_fill(distance < 0, -torch.inf).softmax(-1)
        vertical = mass.sum(2)
        slash = torch.zeros_like(vertical)
        slash.scatter_add_(2, distance.clamp(min=0).flatten().expand(*q.shape[:2], -1), mass.flatten(2))
        vertical[..., :30] = torch.inf
        slash[..., :100] = torch.inf
        lines = vertical.topk(min(verticals, tokens)).indices, slash.topk(min(slashes, tokens)).indices
        return function(q, k, v, *(x.int() for x in lines))

    return run


def minference_blocks(q: Tensor, k: Tensor, v: Tensor) -> Run:
    function = import_module("minference").block_sparse_attention
    k, v = repeated(q, k, v)
    return lambda: function(q, k, v, 100)


def flash_prefill(q: Tensor, k: Tensor, v: Tensor) -> Run:
    function = import_module("ops").flash_prefill_varlen_func
    tokens = q.shape[2]
    nhd = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]  # [N, H, D]
    begins = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)

    def run() -> Tensor:
        out = torch.empty_like(nhd[0])
        function(*nhd, out, begins, tokens, alpha=0.08, block_size=BLOCK)
        return out.transpose(0, 1)[None]

    return run


def flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """Its block-sparse kernel alone, on the blocks that our flex_prefill keeps; its plan is made beforehand."""
    module = import_module("flashinfer")
    prompt = sp.Prompt(q_len=q.shape[2], block_size=BLOCK)
    keep = sp.get_strategy("flex_prefill", gamma=0.95).keep(q, k, prompt).expand(1, q.shape[1], -1, -1)[0]
    k, v = repeated(q, k, v)
    sizes = torch.full((q.shape[1], prompt.n_k), BLOCK, dtype=torch.int32, device=q.device)
    sizes[:, -1] -= prompt.n_k * BLOCK - prompt.kv_len
    workspace = torch.empty(2**27, dtype=torch.uint8, device=q.device)
    wrapper = module.VariableBlockSparseAttentionWrapper(workspace)
    heads, dim = q.shape[1], q.shape[3]
    # The kept keys stand in their order and end with a row's own block, so causality among them is that of the prompt.
    wrapper.plan(keep, sizes, sizes, heads, heads, dim, causal=True, q_data_type=q.dtype)
    return lambda: wrapper.run(q[0], k[0], v[0])[None]


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with a head for each query head."""
    group = q.shape[1] // k.shape[1]
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


@dataclass(frozen=True)
class Peer:
    """Another implementation; docs/peers.md says where each comes from.

    Args:
        name (str): what it is called in tables.
        module (str): what has to be importable.
        make (Callable): from q, k and v to what is timed.
    """

    name: str
    module: str
    make: Callable[[Tensor, Tensor, Tensor], Run]


PEERS = (
    Peer("FlashAttention 2", "flash_attn", partial(flash_attention, "flash_attn")),
    Peer("FlashAttention 3", "flash_attn_interface", partial(flash_attention, "flash_attn_interface")),
    Peer("FlexPrefill", "flex_prefill", flex_prefill),
    Peer("XAttention", "xattn", x_attention),
    Peer("MInference", "minference", minference),
    Peer("MInference (blocks)", "minference", minference_blocks),
    Peer("FlashPrefill", "ops.flashprefill_varlen_func", flash_prefill),
    Peer("FlashInfer (blocks of flex_prefill)", "flashinfer", flashinfer),
)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    command = result_file.command(__file__, argv)
    inputs, of = cases(args)
    report = {
        **origin(command, args.device, **of),
        "repeats": args.repeats,
        "not installed": [peer.name for peer in PEERS if not installed(peer)],
        "results": [],
    }
    for name, layers in inputs:
        found = [compare(*qkv, args.strategies, args.repeats) for qkv in layers]
        dtype = str(layers[0][0].dtype)[6:]
        case = {"case": name, "tokens": layers[0][0].shape[2], "dtype": dtype, "layers": len(layers)}
        report["results"].append(case | {"rows": mean(found)})
    print(markdown(report))
    if args.json:
        result_file.write(args.json, report)
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cases(parser, repeats=5)
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES, metavar="NAME[:OPTION=VALUE,…]")
    return parser.parse_args(argv)


def installed(peer: Peer) -> bool:
    """Whether a peer's module can be found; nothing is imported."""
    package, *rest = peer.module.split(".")
    if package in sys.modules:
        return True
    spec = find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return spec is not None and (not rest or any(Path(folder, *rest).with_suffix(".py").exists() for folder in folders))


@torch.inference_mode()
def compare(q: Tensor, k: Tensor, v: Tensor, strategies: list[str], repeats: int) -> dict[str, dict]:
    """By name, "seconds" and the "relative error" to dense SDPA, or the "error" that a candidate raised."""
    runs, found = candidates(q, k, v, strategies)
    exact = dense_kernels(q, k, v)["default"]().float()
    for name, run in list(runs.items()):  # compiles, and tells what doesn't run
        try:
            out = run()
            wait(q)
            found[name] = {"relative error": float((out.float() - exact).norm() / exact.norm())}
        except Exception as error:  # of any kind, as it is other people's code; the others go on
            found[name] = {"error": in_one_line(error)}
            del runs[name]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wait(q)
            begin = time.perf_counter()
            run()
            wait(q)
            seconds[name].append(time.perf_counter() - begin)
    for name, values in seconds.items():
        found[name]["seconds"] = statistics.median(values)
    return found


def candidates(q: Tensor, k: Tensor, v: Tensor, strategies: list[str]) -> tuple[dict[str, Run], dict[str, dict]]:
    """What is timed, by name, and the errors of peers that can't be set up."""
    prompt = sp.Prompt(q_len=q.shape[2], block_size=BLOCK)
    everything = block_tables(prompt.visible(q.device).expand(1, q.shape[1], -1, -1), prompt)
    runs: dict[str, Run] = {f"SDPA, {name}": run for name, run in dense_kernels(q, k, v).items()}
    inputs = sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt)
    runs["dense FlexAttention"] = lambda: attend(inputs, everything)
    for spec in strategies:
        runs[spec] = partial(sp.sparse_attention, q, k, v, sparse_at_any_length(parse_strategy(spec)))
    errors: dict[str, dict] = {}
    for peer in PEERS:
        if installed(peer):
            try:
                runs[peer.name] = peer.make(q, k, v)
            except Exception as error:  # as above
                errors[peer.name] = {"error": in_one_line(error)}
    return runs, errors


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def mean(layers: list[dict[str, dict]]) -> list[dict]:
    """Means over layers, with each row's time against the fastest SDPA; a candidate that failed once has its error."""
    rows = []
    for name in layers[0]:
        of_layers = [layer[name] for layer in layers]
        failed = [found for found in of_layers if "error" in found]
        values = {} if failed else {key: statistics.mean(x[key] for x in of_layers) for key in of_layers[0]}
        rows.append({"name": name, **(failed[0] if failed else values)})
    sdpa = min(row["seconds"] for row in rows if row["name"].startswith("SDPA") and "seconds" in row)
    for row in rows:
        if "seconds" in row:
            row["against SDPA"] = sdpa / row["seconds"]
    return rows


def markdown(report: dict) -> str:
    lines = [f"{report['device']}, {report['threads']} threads, torch {report['torch']}, {report['date'][:10]}", ""]
    for case in report["results"]:
        lines += [f"**{case['case']}**, mean of {case['layers']} layers", "", table(case), ""]
    if report["not installed"]:
        lines.append(f"not installed: {', '.join(report['not installed'])}")
    return "\n".join(lines)


def table(case: dict) -> str:
    """The rows of a case as a Markdown table."""
    lines = ["| implementation | ms | against SDPA | relative error |", "|---|---|---|---|"]
    for row in case["rows"]:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error'].replace('|', '/')} | | |")
        else:
            lines.append(
                f"| {row['name']} | {1e3 * row['seconds']:.1f} | {row['against SDPA']:.2f}x "
                f"| {row['relative error']:.3f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

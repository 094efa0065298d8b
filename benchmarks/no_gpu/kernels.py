"""Compile what a GPU would run, without one, and print what it was compiled to.

    python benchmarks/no_gpu/kernels.py

Prints for the attention kernel of each kind of call whether it compiles, its registers and spills, and how wide it
reads keys and values. See ``pretend`` for what this needs. Exits with status 1 if a kernel doesn't compile or reads
keys two bytes at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pretend

if __name__ == "__main__":
    pretend.needs_cuda_build()
    pretend.with_libraries()
    compiled, _ = pretend.pretend()  # before others import inductor

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_prefill as sp

HEADS, KEY_HEADS = 32, 8


def heads_first(heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, heads, tokens, dim, dtype=dtype, device="cuda")


def tokens_first(heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, tokens, heads, dim, dtype=dtype, device="cuda").transpose(1, 2)


def of_projection(heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, tokens, heads + 16, dim, dtype=dtype, device="cuda")[:, :, 16:].transpose(1, 2)


def of_cache(heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, heads, tokens + 1000, dim, dtype=dtype, device="cuda")[:, :, :tokens]


CASES: dict[str, dict[str, Any]] = {
    "whole blocks": {},
    "ragged": {"tokens": 4001},
    "chunk": {"tokens": 8000, "queries": 1000},
    "short chunk": {"tokens": 8000, "queries": 40},
    "short chunk, no groups": {"tokens": 8000, "queries": 40, "key_heads": HEADS},
    "1M tokens, in chunks": {"tokens": 1 << 20},
    "tokens before heads": {"made": tokens_first},
    "part of a projection": {"made": of_projection},
    "part of a cache": {"made": of_cache},
    "heads of 64": {"dim": 64},
    "heads of 96": {"dim": 96},
    "heads of 256": {"dim": 256},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "blocks of 64": {"block_size": 64},
    "blocks of 32": {"block_size": 32},
    "window": {"window": 1000},
    "soft cap": {"softcap": 30.0},
    "sinks": {"sinks": lambda: torch.empty(HEADS, device="cuda")},
    "means of blocks": {"strategy": "mean_correction"},
    "estimate and attention of `flash_prefill`": {"strategy": "flash_prefill"},
    "the same, heads of 64": {"strategy": "flash_prefill", "dim": 64},
    "BLOCK_M=64, BLOCK_N=64, 4 warps": {"options": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}},
    "BLOCK_M=128, BLOCK_N=64, 4 warps": {"options": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4}},
    "BLOCK_M=128, BLOCK_N=128, 8 warps, 2 stages": {
        "options": {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    },
    "USE_TMA": {"options": {"USE_TMA": True}},
}


def attend(
    *,
    tokens: int = 4096,
    queries: int | None = None,
    key_heads: int = KEY_HEADS,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 128,
    made: Callable[..., Tensor] = heads_first,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Callable[[], Tensor] | None = None,
    strategy: str = "a_shape",
    options: dict[str, Any] | None = None,
) -> None:
    q = made(HEADS, queries or tokens, dim, dtype)
    k, v = (made(key_heads, tokens, dim, dtype) for _ in "kv")
    blocks: dict[str, Any] = {"min_length": 0, "block_size": block_size}
    of: dict[str, Any] = {"of": {"name": "a_shape", **blocks}} if strategy in sp.list_wrappers() else blocks
    prompt = sp.Prompt(q.shape[2], tokens, block_size, window=window)
    logits: dict[str, Any] = {"softcap": softcap, "sinks": sinks() if sinks else None}
    with sp.kernel_options(**options or {}):
        sp.sparse_attention(q, k, v, sp.get_strategy(strategy, **of), prompt=prompt, **logits)


def attention_kernels(kernels: list[pretend.Kernel]) -> list[dict[str, Any]]:
    """Each case compiled separately, then several layouts in turn, as in a process with several models."""
    rows = []
    for name, case in CASES.items():
        torch._dynamo.reset()
        kernels.clear()
        try:
            attend(**case)
        except Exception as error:  # any error of a compiler is a finding
            rows.append({"case": name, "error": str(error).partition("\n")[0][:200]})
            continue
        rows += [{"case": name, **row(kernel, case)} for kernel in attention_of(kernels)]
    torch._dynamo.reset()
    kernels.clear()
    for made in (heads_first, tokens_first, of_projection, of_cache):
        attend(made=made)
    attend(made=heads_first, tokens=4001)
    return rows + [{"case": "several layouts in turn", **row(kernel, {})} for kernel in attention_of(kernels)]


def attention_of(kernels: list[pretend.Kernel]) -> list[pretend.Kernel]:
    """The kernels of attention, which are made from templates; other kernels make lists or join results."""
    return [kernel for kernel in kernels if kernel.name.startswith("triton_tem_")]


def row(kernel: pretend.Kernel, case: dict[str, Any]) -> dict[str, Any]:
    return {
        "warps": kernel.warps,
        "shared KiB": kernel.shared // 1024,
        "registers": kernel.registers,
        "stack bytes": kernel.stack,
        "products": kernel.products,
        "copies of 16 bytes": "TMA" if kernel.takes_tensors else kernel.wide_copies,
        "loads of 2 bytes": kernel.narrow_loads,
    }


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(kernels: list[pretend.Kernel]) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        found = attention_kernels(kernels)
    print(table(found))
    bad = [row["case"] for row in found if "error" in row or row["loads of 2 bytes"]]
    if bad:
        print("Failed:", ", ".join(bad), file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(compiled))

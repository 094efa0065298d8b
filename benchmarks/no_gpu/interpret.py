"""Run attention as on a GPU, without one: its kernels by Triton's interpreter, everything else by PyTorch on the CPU.

    python benchmarks/no_gpu/interpret.py                    # all strategies, wrappers and kinds of calls, some minutes
    python benchmarks/no_gpu/interpret.py xattention sinks   # some

Tensors claim to be on a GPU, so all code takes its path for GPUs. Prints the largest differences of each kernel's
output from a plain softmax over the same lists, and of the whole output from that of the same strategy on the CPU.
Exits with status 1 if they exceed rounding.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pretend

if __name__ == "__main__":
    pretend.needs_cuda_build()
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    pretend.with_libraries()

import torch
from interpreter import Compiler
from on_gpu import GPU, OnGPU, no_device
from steps import STEPS
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.core.prompt import mask_mod
from sparse_prefill.estimators import token_sums
from sparse_prefill.kernel import block_sparse, flex

BLOCK = 64
TOLERANCE = 0.01  # of outputs in fp16


def plain_attention(q, k, v, is_bnhd, tables, mask_tensors, *others):  # type: ignore[no-untyped-def]
    """The compiled function as a plain softmax in fp32 over the token pairs that the lists keep."""
    *modifiers, size, scale, _ = others
    softcap, segments = modifiers[0] if modifiers else (None, None)
    q, k, v = flex.heads_first((q, k, v), is_bnhd)
    heads, rows, keys = torch.arange(q.shape[1]), torch.arange(q.shape[2]), torch.arange(k.shape[2])
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    at = torch.arange(q.shape[0])[:, None, None, None], heads[:, None, None], rows[:, None], keys
    scores, allowed = q.float() @ k.mT * scale, mask_mod(*mask_tensors)(*at)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if segments is not None:
        batch_step, head_step, row_step = (int(x) for x in segments.strides)
        slot = (keys - segments.first_slot).clamp(min=0)
        index = at[0] * batch_step + at[1] * head_step + at[2] // size * row_step + slot
        allowed = torch.where(keys < segments.first_slot, allowed, segments.table[index])
        added = torch.zeros(())
        for first, bias in segments.biases:
            added = torch.where(keys >= first, bias[heads][:, None, None] if bias.ndim else bias, added)
        scores = scores + added
    partial, full = (_listed(*x, q, k, size) for x in (tables[:2], tables[2:]))
    kept = full | (partial & allowed)
    shares = scores.masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num(0)
    return (shares @ v).to(q.dtype)


def _listed(counts: Tensor, indices: Tensor, q: Tensor, k: Tensor, size: int) -> Tensor:
    """Token pairs in the blocks of a list: bool [B, Hq, M, N]."""
    blocks = torch.zeros(*counts.shape, -(-k.shape[2] // size), dtype=torch.bool)
    *row, place = (torch.arange(indices.shape[-1]) < counts[..., None]).nonzero(as_tuple=True)
    blocks[(*row, indices[(*row, place)].long())] = True
    tokens = blocks.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return tokens[:, :, : q.shape[2], : k.shape[2]].expand(*q.shape[:2], -1, -1)


def qkv(
    batch: int = 1,
    queries: int = 1100,
    tokens: int = 1100,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    shapes = ((heads, queries, dim), (kv_heads, tokens, dim), (kv_heads, tokens, value_dim or dim))
    q, k, v = (torch.randn(batch, *shape, generator=source) for shape in shapes)
    return (4 * q).to(dtype), k.to(dtype), v.to(dtype)


def small(name: str, **options: Any) -> sp.Strategy:
    """A strategy whose sizes in tokens are half as large, for blocks of 64."""
    defaults = registry.strategies.options(name)
    sizes = {option: value // 2 for option, value in defaults.items() if type(value) is int and value >= 128}
    return sp.get_strategy(name, **{**sizes, "block_size": BLOCK, "min_length": 0, **options})


def cases() -> dict[str, tuple]:
    """By name: a strategy, q, k and v, and the other arguments of a call."""
    found: dict[str, tuple] = {name: (small(name), qkv(), {}) for name in sp.list_strategies()}
    means = {"name": "mean_pool", "min_length": 0, "block_size": BLOCK}
    for name in sp.list_wrappers():
        heads = {"heads": {1: {**means, "name": "a_shape"}}} if name == "by_head" else {}
        if name != "layer_schedule":
            found[name] = sp.get_strategy(name, of=means, **heads), qkv(), {}
    one = small("mean_pool")

    def prompt(queries: int = 1100, tokens: int = 1100, **what: Any) -> dict[str, sp.Prompt]:
        return {"prompt": sp.Prompt(queries, tokens, BLOCK, **what)}

    two = qkv(2, 700, 700)
    documents = torch.arange(700).div(250, rounding_mode="floor").expand(2, -1).contiguous()
    found |= {
        "chunk": (small("flex_prefill"), qkv(queries=300), {}),
        "short chunk": (small("flex_prefill"), qkv(queries=40), {}),
        "short chunk, no groups": (small("flex_prefill"), qkv(queries=40, kv_heads=4), {}),
        "short chunk with sinks": (one, qkv(queries=40), {"sinks": torch.linspace(-1, 1, 4)}),
        "short chunk, no groups, with all": (
            sp.get_strategy("mean_correction", of=means),
            qkv(queries=40, kv_heads=4),
            {"sinks": torch.linspace(-1, 1, 4), "softcap": 7.0, **prompt(40, window=333)},
        ),
        "short chunks in a batch, no groups": (one, qkv(2, 100, 700, kv_heads=4), {}),
        "one query": (one, qkv(queries=1), {}),
        "batch": (small("flex_prefill"), two, {}),
        "window": (one, qkv(), prompt(window=333)),
        "left padding": (one, two, prompt(700, 700, left_padding=[130, 0])),
        "right padding": (one, two, prompt(700, 700, right_padding=[130, 0])),
        "documents": (one, two, prompt(700, 700, documents=documents)),
        "soft cap": (one, qkv(), {"softcap": 5.0}),
        "sinks": (one, qkv(), {"sinks": torch.linspace(-1, 1, 4)}),
        "sinks, soft cap and window": (
            small("a_shape"),
            qkv(),
            {"sinks": torch.linspace(-1, 1, 4), "softcap": 7.0, **prompt(window=333)},
        ),
        "three heads to a key head": (small("xattention"), qkv(heads=6), {}),
        "heads of 96, values of 32": (small("flex_prefill"), qkv(dim=96, value_dim=32), {}),
        "heads of 80": (small("flash_prefill"), qkv(dim=80), {}),
        "fp32": (small("flex_prefill"), qkv(dtype=torch.float32), {}),
        "blocks of 256": (small("flex_prefill", block_size=256), qkv(1, 1152, 1152), {}),
        "tokens before heads": (one, tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv()), {}),
        "blocks of 128": (small("flex_prefill", block_size=128), qkv(), {}),
        "heads of 128, blocks of 128": (small("flex_prefill", block_size=128), qkv(1, 768, 768, dim=128), {}),
        "heads of 128, ragged": (small("flash_prefill", block_size=128), qkv(2, 500, 1000, dim=128), {}),
        "heads of 128, values of 96": (small("a_shape", block_size=128), qkv(dim=128, value_dim=96), {}),
        "blocks of 16": (small("flex_prefill", block_size=16), qkv(1, 400, 400), {}),
        "in chunks": (small("xattention"), qkv(), {"table": 400}),
        "by heads": (small("flex_prefill"), qkv(), {"table": 400}),
    }
    return found


def compare(compiler: Compiler, strategy: sp.Strategy, tensors: tuple, table: int | None = None, **others: Any) -> str:
    """Largest differences of a kernel's output and of the whole, and whether they are rounding."""
    of_kernel = [0.0]

    def interpreted(name: str) -> Callable:
        def run(*args: Any) -> Tensor:
            (found,) = compiler.run(f"sparse_prefill.kernel.flex:{name}", args)
            want = plain_attention(*tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, args))
            of_kernel.append((found.float() - want.float()).abs().max().item())
            return OnGPU(found)

        return lambda: run

    def shares(*args: Any) -> Tensor:
        return OnGPU(*compiler.run("sparse_prefill.estimators.token_sums:_shares", args))

    names, limit = ("compiled", "compiled_with_modifiers"), block_sparse.MAX_TABLE_ENTRIES
    usual, usual_shares = [getattr(flex, name) for name in names], token_sums._shares
    try:
        block_sparse.MAX_TABLE_ENTRIES, token_sums._shares = table or limit, shares
        for name in names:
            setattr(flex, name, interpreted(name))
        with GPU(), torch.no_grad():
            there = {name: OnGPU(x) if isinstance(x, Tensor) else x for name, x in others.items()}
            found = sp.sparse_attention(*(OnGPU(x) for x in tensors), strategy, **there)
        for name in names:
            setattr(flex, name, lambda: plain_attention)
        with torch.no_grad():
            want = sp.sparse_attention(*tensors, strategy, **others)
    finally:
        block_sparse.MAX_TABLE_ENTRIES, token_sums._shares = limit, usual_shares
        for name, function in zip(names, usual, strict=True):
            setattr(flex, name, function)
    whole = (found.held.float() - want.float()).abs().max().item()  # type: ignore[attr-defined]
    good = max(of_kernel) < TOLERANCE and whole < TOLERANCE
    return f"kernel {max(of_kernel):.4f} ({len(of_kernel) - 1} calls), whole {whole:.4f}{'' if good else '  WRONG'}"


def compare_step(compiler: Compiler, name: str, *given: Any) -> str:
    """Largest difference between the compiled and the eager results of a step."""
    module, _, function = name.partition(",")[0].rpartition(".")
    path = f"sparse_prefill.{module}"
    want = tree_leaves(getattr(importlib.import_module(path), function)(*tree_map(_copied, given)))
    found = compiler.run(f"{path}:{function}", tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, given))
    apart = max((a.double() - b.double()).abs().max().item() for a, b in zip(found, want, strict=True))
    return f"{apart:.1e}{'' if apart < 1e-6 else '  WRONG'}"


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


def main(names: list[str]) -> int:
    wrong = 0
    with ExitStack() as stack:
        no_device(stack)
        torch.compile = lambda function, **options: function  # type: ignore[assignment]  # steps run eagerly; compare_step compiles them
        compiler = Compiler()
        stack.callback(compiler.process.terminate)
        runs: dict[str, Callable[[], str]] = {}
        for name, (strategy, tensors, others) in cases().items():
            runs[name] = lambda s=strategy, t=tensors, o=others: compare(compiler, s, t, **o)  # type: ignore[misc]
        for name, given in STEPS.items():
            runs[name] = lambda n=name, g=given: compare_step(compiler, n, *g)  # type: ignore[misc]
        for name in names or runs:
            try:
                result = runs[name]()
            except Exception as error:  # any error of the compiler or the interpreter is a finding
                result = f"WRONG: {str(error)[:300]}"
            wrong += "WRONG" in result
            print(f"{name:45} {result}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

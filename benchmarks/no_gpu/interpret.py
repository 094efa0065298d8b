"""Run attention as on a GPU, without one: its kernels by Triton's interpreter, everything else by PyTorch on the CPU.

    python benchmarks/no_gpu/interpret.py                    # all strategies, wrappers and situations, some minutes
    python benchmarks/no_gpu/interpret.py xattention sinks   # some

Tensors say that they are on a GPU, so all code takes the way that it takes there. Kernels are compiled by another
process as ``pretend`` says, and the source that inductor wrote for them is interpreted. Prints the largest differences:
of each kernel's output from a plain softmax over the same lists, and of the whole from the same strategy's on the CPU.
Leaves with status 1 where they exceed rounding.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import pretend

SERVES = "--serve" in sys.argv

if __name__ == "__main__":
    pretend.needs_cuda_build()
    if not SERVES:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    pretend.with_libraries()
    seen = pretend.pretend() if SERVES else None

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.core.prompt import mask_mod
from sparse_prefill.estimators import token_sums
from sparse_prefill.kernel import block_sparse, flex

BLOCK = 64
TOLERANCE = 0.01  # of outputs in fp16


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def logits(*shape: int) -> Tensor:
    x = 20 * random(*shape)
    x[..., -2:] = -torch.inf
    return x


def table(*shape: int) -> Tensor:
    return random(*shape) > 0.25


def masses(*shape: int) -> Tensor:
    return random(*shape).mul(3).exp().softmax(-1)


def token_sums_of(tokens: int, blocks: int, *, group: int) -> tuple:
    """Queries of a chunk behind a prefix, and means of key blocks of 16 up to its end."""
    rows = -(-tokens // 16) * 16
    stops = (16 * blocks - tokens + torch.arange(rows) + 1) // 16
    firsts = torch.where(torch.arange(rows) < tokens, 3, blocks)  # those behind the last query score nothing
    some, full = token_sums._tiles_scored(firsts, stops, torch.tensor([0, 128]), 16)
    return (
        3 * random(1, 4, tokens, 32).bfloat16(),
        random(1, 2, blocks, 32),
        torch.zeros(1, dtype=torch.int64),
        torch.arange(rows),
        torch.arange(256),
        firsts.int(),
        stops.int(),
        some[:, None],
        full[:, None],
        16,
        group,
        tuple(token_sums._tiles(32, 16).items()),
    )


def estimates() -> tuple[Tensor, ...]:
    """Of means, columns and diagonals, and the blocks in sight."""
    return masses(1, 4, 9, 40), masses(1, 4, 1, 40), masses(1, 4, 9, 40).flip(-1), table(1, 1, 9, 40)


STEPS: dict[str, tuple] = {  # compiled beside attention: what they are given
    "estimators.block_shares._peaks_and_sums": (logits(192), 16, 0.3),
    "estimators.block_shares._peaks_and_sums, of means": (logits(192), 8, 0.3),
    "estimators.token_sums._tiles_scored": (torch.arange(64) - 40, torch.arange(64) + 70, torch.tensor([0, 60]), 16),
    "estimators.token_sums._shares": token_sums_of(320, 200, group=1),
    "estimators.token_sums._shares, a chunk of groups": token_sums_of(150, 200, group=2),
    "estimators.proxy_heads._highest_probability": (logits(1, 2, 16, 32), 16),
    "estimators.proxy_heads._highest_probability, ragged": (logits(1, 1, 18, 20), 16),
    "estimators.pooled.softmax_among": (logits(1, 4, 9, 40), table(1, 1, 9, 40), 0.25),
    "estimators.representative._spread": (table(1, 4, 40), torch.arange(31, 40)),
    "estimators.spectral_bands._band": (random(1, 4, 9, 64), table(64)),
    "strategies.mean_slash._weights": (*estimates(), masses(1, 4, 9, 40).roll(7, -1)),
    "strategies.mean_slash._mixture": (*estimates(), masses(1, 4, 1, 1, 6).movedim(-1, 0)),
    "strategies.flex_prefill.jensen_shannon_distance": (masses(1, 4, 40), masses(1, 4, 40).flip(-1)),
    "selectors.cutoff.reaching": (masses(1, 4, 9, 40), torch.tensor([0.9]), None, 1, False),
    "selectors.cutoff.reaching, ties": (table(1, 4, 9, 40).float(), torch.tensor([0.6]), None, 1, False),
    "selectors.cutoff.reaching, forced": (masses(2, 4, 9, 40), torch.tensor([0.9]), table(1, 1, 9, 40), 1, False),
    "selectors.cutoff.reaching, of a head": (masses(1, 4, 9, 40), torch.tensor([[0.9]]), None, 2, False),
    "selectors.cutoff.reaching, within": (masses(1, 4, 9, 40), torch.tensor([[0.9]]), None, 2, True),
    "kernel.block_lists._in_lines_of_16": (table(6, 40),),
    "kernel.block_lists._in_lines_of_16, a few columns": (table(9, 2),),
    "kernel.block_lists._rows_listed": (table(24, 3), torch.arange(72).view(24, 3)),
}


# Kernels, compiled by another process ----------------------------------------------------------------------


def serve(path: str, launches: list[tuple]) -> None:
    """Answer calls, described by the shapes of their tensors, with the source and the arguments of their kernels."""
    buffers: list[Tensor] = []
    views: dict[int, tuple] = {}
    guards: Any = torch._C._dynamo.guards
    empty = guards._empty_strided_cuda

    def noted(*args: Any) -> Tensor:
        buffers.append(empty(*args))
        return buffers[-1]

    def view(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        found = x.as_strided(size, stride, x.storage_offset() + offset)
        views[id(found)] = found, x, tuple(size), tuple(stride), offset
        return found

    guards._empty_strided_cuda, guards._reinterpret_tensor = noted, view
    connection = Listener(path, "AF_UNIX").accept()
    while True:
        try:
            name, described, spec = connection.recv()
        except EOFError:
            return
        buffers.clear(), views.clear(), launches.clear()
        try:
            connection.send(answer(name, described, spec, launches, buffers, views))
        except Exception as error:  # told to the process that asked
            connection.send(f"{type(error).__name__}: {str(error)[:1000]}")


def answer(name: str, described: list, spec: Any, launches: list, buffers: list, views: dict) -> tuple:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def made(x: Any) -> Any:
        if not isinstance(x, tuple):
            return x
        shape, stride, dtype, is_static = x
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device="cuda")
        if is_static:
            torch._dynamo.mark_static(tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), flex.one_graph_for_all_lengths():
        given = [made(x) for x in described]
        args = tree_unflatten(given, spec)
        module, _, function = name.partition(":")
        called = getattr(importlib.import_module(module), function)
        out = called()(*args) if function.startswith("compiled") else called(*args)

    def place(x: Tensor) -> tuple:
        for kind, among in (("given", given), ("buffer", buffers)):
            for i, other in enumerate(among):
                if other is x:
                    return kind, i
        _, of, *how = views[id(x)]
        return "view", place(of), *how

    calls = []
    for tuner, given_to in launches:
        source = Path(str(inspect.getsourcefile(tuner.fn.fn))).read_text()
        sizes = dict(tuner.launchers[0].config.kwargs) if tuner.launchers else {}
        values = [place(x) if isinstance(x, Tensor) else int(x) for x in given_to]
        calls.append(
            (tuner.fn.fn.__name__, source, tuner.fn.arg_names, values, tuner.inductor_meta["grid_type"], sizes)
        )
    outputs = [place(x) for x in tree_leaves(out)]
    return calls, [(tuple(x.shape), x.stride(), x.dtype) for x in buffers], outputs


class Compiler:
    """The other process, and the functions that it compiled."""

    def __init__(self) -> None:
        path = f"{tempfile.mkdtemp()}/socket"
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", path], env=env)
        self.connection: Connection = self._connected(path)
        self.functions: dict[str, Callable] = {}
        self.folder = Path(tempfile.mkdtemp())

    def _connected(self, path: str) -> Connection:
        for _ in range(600):
            try:
                return Client(path, "AF_UNIX")
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.1)
        raise RuntimeError("The process that compiles doesn't answer.")

    def run(self, name: str, args: tuple) -> list[Tensor]:
        """The outputs of a compiled function, its kernels interpreted."""
        leaves, spec = tree_flatten(args)
        self.connection.send((name, [_described(x) for x in leaves], spec))
        found = self.connection.recv()
        if isinstance(found, str):
            raise RuntimeError(found)
        calls, buffers, outputs = found
        memory = [torch.empty_strided(*sizes, dtype=dtype) for *sizes, dtype in buffers]
        for x in memory:
            x.fill_(torch.nan if x.is_floating_point() else 0)

        def tensor(place: tuple) -> Tensor:
            kind, which, *how = place
            if kind == "view":
                size, stride, offset = how
                return torch.as_strided(tensor(which), size, stride, tensor(which).storage_offset() + offset)
            return leaves[which].held if kind == "given" else memory[which]

        for of, source, names, values, grid, sizes in calls:
            values = [tensor(x) if isinstance(x, tuple) else x for x in values]
            self._launch(self._function(of, source), grid, names, values, sizes)
        return [tensor(place) for place in outputs]

    def _launch(self, function: Any, grid: str, names: list[str], values: list, sizes: dict[str, int]) -> None:
        if grid == "FixedGrid":
            function[tuple(values[-3:])](*values[:-3])
            return
        numbers = dict(zip(names, values, strict=False))
        if grid not in ("Grid1D", "Grid2DWithYZOverflow"):
            raise RuntimeError(f"There is no interpretation of the grid {grid}.")
        axes = "x" if grid == "Grid1D" else "xy"
        sizes = {name: size for name, size in sizes.items() if name in names}
        if axes == "x" and not any(name.startswith("R0_") for name in sizes):
            sizes["XBLOCK"] = max(sizes["XBLOCK"], 512)  # fewer programs
        function[tuple(-(-numbers[f"{x}numel"] // sizes[f"{x.upper()}BLOCK"]) for x in axes)](*values, **sizes)

    def _function(self, name: str, source: str) -> Any:
        """The function as Triton's interpreter takes it: without inductor's decorator, and functions of the device."""
        if source not in self.functions:
            begin = source.index("@triton_heuristics.")
            end = source.index("@triton.jit", begin)
            source_here = source[:begin] + source[end:]
            source_here = source_here.replace("triton_helpers.set_driver_to_gpu()", "")
            for called in ("exp2", "log", "ceil", "floor"):
                source_here = source_here.replace(f"libdevice.{called}(", f"tl.{called}(")
            for called, value in (("tanh", "2 * tl.sigmoid(2 * x) - 1"), ("isnan", "x != x")):
                source_here = source_here.replace(f"libdevice.{called}(", f"_{called}(")
                source_here += f"\n\n@triton.jit\ndef _{called}(x):\n    return {value}\n"
            path = self.folder / f"kernel_{len(self.functions)}.py"  # the interpreter reads it from a file
            path.write_text(source_here)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.functions[source] = getattr(module, name)
        return self.functions[source]


def _described(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if not isinstance(x, OnGPU):
        raise RuntimeError("A tensor on the CPU is handed to a kernel of the GPU.")
    if x.storage_offset():
        raise RuntimeError("A tensor that is part of another is handed to a kernel.")
    return tuple(x.shape), x.stride(), x.dtype, hasattr(x, "_dynamo_static_indices")


# Tensors that say they are on a GPU ------------------------------------------------------------------------

aten = torch.ops.aten


class OnGPU(Tensor):
    """A tensor whose device is "cuda" and whose values, ``held``, are on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cuda:0",
        )
        found.held = held
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return on_gpu(func, args, kwargs or {})


class GPU(TorchDispatchMode):
    """Tensors that are made on the device "cuda" are such ones."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        device = (kwargs or {}).get("device")
        made_there = device is not None and torch.device(device).type == "cuda"
        if made_there or any(isinstance(x, OnGPU) for x in tree_leaves((args, kwargs))):
            return on_gpu(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def on_gpu(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU. Tests look for what would wait for a GPU, tests/test_host_syncs.py."""
    there = [x for x in tree_leaves((args, kwargs)) if isinstance(x, OnGPU)]
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else torch.device(device).type == "cuda"
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, (args, kwargs))
    if func is aten.bmm.dtype:  # there is none on CPUs
        func, args = aten.bmm.default, (args[0].to(args[2]), args[1].to(args[2]))
    found = func(*args, **kwargs)
    if not goes_there:
        return found
    written = [x for x in there if any(x.held is y for y in tree_leaves(found) if isinstance(y, Tensor))]
    if written and any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
        return written[0]
    return tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, found)


def no_device(stack: ExitStack) -> None:
    """What torch asks a device in passing."""
    for name, answer in (("_lazy_init", None), ("is_initialized", False), ("get_device_capability", (9, 0))):
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    sdpa = F.scaled_dot_product_attention

    def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if not isinstance(q, OnGPU):
            return sdpa(q, k, v, **options)
        here = tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, ((q, k, v), options))
        return OnGPU(sdpa(*here[0], **here[1]))

    F.scaled_dot_product_attention = dense  # type: ignore[assignment]
    stack.callback(setattr, F, "scaled_dot_product_attention", sdpa)


# What is compared ------------------------------------------------------------------------------------------


def plain_attention(q, k, v, is_bnhd, tables, mask_tensors, *others):  # type: ignore[no-untyped-def]
    """The kernel's function as a softmax over what the lists keep, in fp32."""
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
    """Strategy, tensors and what else a call is given, by name."""
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

    def sums(*args: Any) -> Tensor:
        return OnGPU(*compiler.run("sparse_prefill.estimators.token_sums:_shares", args))

    names, limit = ("compiled", "compiled_with_modifiers"), block_sparse.MAX_TABLE_ENTRIES
    usual, usual_sums = [getattr(flex, name) for name in names], token_sums._shares
    try:
        block_sparse.MAX_TABLE_ENTRIES, token_sums._shares = table or limit, sums
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
        block_sparse.MAX_TABLE_ENTRIES, token_sums._shares = limit, usual_sums
        for name, function in zip(names, usual, strict=True):
            setattr(flex, name, function)
    whole = (found.held.float() - want.float()).abs().max().item()  # type: ignore[attr-defined]
    good = max(of_kernel) < TOLERANCE and whole < TOLERANCE
    return f"kernel {max(of_kernel):.4f} ({len(of_kernel) - 1} calls), whole {whole:.4f}{'' if good else '  WRONG'}"


def compare_step(compiler: Compiler, name: str, *given: Any) -> str:
    """Largest difference of a compiled step from the same run as it stands."""
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
        torch.compile = lambda function, **options: function  # type: ignore[assignment]  # steps of estimates, told apart
        compiler = Compiler()
        stack.callback(compiler.process.terminate)
        runs: dict[str, Callable[[], str]] = {}
        for name, (strategy, tensors, others) in cases().items():
            runs[name] = lambda s=strategy, t=tensors, o=others: compare(compiler, s, t, **o)  # type: ignore[misc]
        for name, given in STEPS.items():
            runs[name] = lambda n=name, g=given: compare_step(compiler, n, *g)  # type: ignore[misc]
        for name in names or runs:
            try:
                told = runs[name]()
            except Exception as error:  # whatever a compiler or an interpreter raises is what is looked for
                told = f"WRONG: {str(error)[:300]}"
            wrong += "WRONG" in told
            print(f"{name:45} {told}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    if SERVES:
        assert seen is not None
        serve(sys.argv[-1], seen[1])
    else:
        sys.exit(main(sys.argv[1:]))

"""Compile FlexAttention for CPUs, where inductor doesn't hand its matrix products to AMX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from threading import Lock
from typing import Any

import torch
from torch import Tensor

ROWS = 8  # more are faster still, and take the C++ compiler several times as long
_one_at_a_time = Lock()


def compile_flex(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor, as a backend of ``torch.compile``, with a CPU kernel that multiplies tiles of queries and keys.

    In fp32, and without AMX in bf16, the kernel of inductor (torch 2.13) multiplies one row of queries at a time with
    16 keys, which it transposes anew for each row. Tiles of several rows transpose once for all of them. Results are
    the same but for the order of sums.
    """
    from torch._inductor.compile_fx import compile_fx

    if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in inputs):
        return compile_fx(graph, inputs)
    with _one_at_a_time, _tiles():
        return compile_fx(graph, inputs)


@contextmanager
def _tiles() -> Iterator[None]:
    """While it is open, inductor's products of queries and keys, and no others, are made of tiles."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    module: Any = import_module("torch._inductor.codegen.cpp_micro_gemm")
    lanes = pick_vec_isa().nelements()
    usual = getattr(module, "CppMicroGemmFP32Vec", None)
    if usual is None or lanes not in (8, 16):  # AVX2 and AVX-512; others weren't measured
        yield
        return

    def tiles(name: str, *args: Any, **kwargs: Any) -> Any:
        gemm = usual(name, *args, **kwargs)
        if name.endswith("_transpose_b"):
            blocking = gemm.register_blocking
            gemm.register_blocking = type(blocking)(ROWS, lanes, blocking.block_k)
        return gemm

    # Kernels that other code of the process compiled in the usual way must not be taken from a cache, nor ours by it.
    config: Any = import_module("torch.compiler.config")
    tag = f"{config.cache_key_tag}sparse_prefill tiles of {ROWS}"
    module.CppMicroGemmFP32Vec = tiles
    try:
        with config.patch(cache_key_tag=tag):
            yield
    finally:
        module.CppMicroGemmFP32Vec = usual

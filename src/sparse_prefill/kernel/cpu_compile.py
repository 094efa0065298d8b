"""Compile FlexAttention for CPUs: PyTorch's own library multiplies matrices, and rows of blocks go to free threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

CPU_INFO = Path("/proc/cpuinfo")

# C++ of one product, C [M, N] = A [M, K] @ B [K, N], or plus C. ``brgemm`` takes B in this order only, so keys, which
# come as [N, K], are transposed into memory that each thread keeps. Both functions are in headers of inductor's kernel.
SIGNATURE = """
template <bool accum>
inline void {name}(
    const float* A, const float* B, float* C, int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc) {{
"""
TRANSPOSE = """
  static thread_local std::vector<float> columns;
  if (columns.size() < static_cast<size_t>(K * N)) columns.resize(K * N);
  at::vec::transpose_mxn<float>(B, ldb, columns.data(), N, N, K);
  B = columns.data(), ldb = N;
"""
PRODUCT = """
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, accum, A, B, C, false);
}}
"""
# Inductor's kernel gives each thread as many rows of blocks as any other, side by side, however much is in them.
RUNS = """  at::parallel_for(0, batchSize * num_head * qSlice, 1, [&](int64_t begin, int64_t end) {
    int64_t i = 0, j = 0, k = 0;
    at::native::data_index_init(begin, i, batchSize, j, num_head, k, qSlice);"""
LOOP = "    for ([[maybe_unused]] auto z : c10::irange(begin, end)) {"
# Here each takes the next row as soon as it is done with one, so that none is idle while another has rows left.
ANY_ROW = """  std::atomic<int64_t> next_row{0};
  at::parallel_for(0, batchSize * num_head * qSlice, 1, [&](int64_t, int64_t) {
    int64_t i = 0, j = 0, k = 0;"""
NEXT_ROW = """    for (int64_t z = next_row++; z < batchSize * num_head * qSlice; z = next_row++) {
      at::native::data_index_init(z, i, batchSize, j, num_head, k, qSlice);"""
# Inductor's kernel multiplies bf16 by the library where there is AMX alone. AVX-512 has products of bf16, too, and the
# library wants the same order of keys and values for both.
HAS_PRODUCTS = "at::native::cpublas::could_pack(at::kBFloat16)"
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # that keep oneDNN from using what the CPU has
_one_at_a_time = Lock()


def compile_flex(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor, as a backend of ``torch.compile``, with a faster CPU kernel.

    In fp32, the kernel of inductor (torch 2.13) multiplies queries and keys in generated loops, one row of queries at a
    time with 16 keys that it transposes anew for each row. Here it calls the library, as it does for values and as SDPA
    does for both, which takes the C++ compiler half the time, too. Results are the same but for the order of sums.

    In bf16, on CPUs with AVX512_BF16 and without AMX, that kernel does the same; here both products are the library's.

    In any dtype, it divides the rows of blocks among the threads in advance, by their number. Sparse rows aren't
    equally long, so here threads take them one by one. Results are the same to the bit.

    Where a version of torch has no such internals, or where this doesn't compile, it is the kernel of inductor.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError

    if not any(isinstance(x, Tensor) and x.device.type != "cpu" for x in inputs):
        with suppress(InductorError, ImportError, AttributeError), _one_at_a_time, _faster_kernel():
            return compile_fx(graph, inputs)
    return compile_fx(graph, inputs)


def kernel_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which attention over x is computed fastest, and no less exactly than in that of x.

    Half precision is for GPUs, for CPUs with AMX, and bf16 for those of AMD with AVX512_BF16. On others its products
    take longer than those in fp32, by so much that casts before and after don't count: on Intel's without AMX, as
    virtual machines have them, those of AVX512_BF16 run at half the rate of fp32.
    """
    if x.device.type != "cpu":
        return x.dtype
    return x.dtype if x.dtype in (torch.bfloat16, torch.float16) and _has_products(x.dtype) else torch.float32


@torch.compiler.assume_constant_result  # so that estimators can be compiled, too
def _has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU has them, and the library that multiplies may use them: in bf16 it raises an error if not."""
    if dtype == torch.float16:
        return torch.cpu._is_amx_fp16_supported()
    by_amx, by_avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported() and _is_of_amd()
    limited = any(os.environ.get(name, "ALL") not in ("ALL", "DEFAULT") for name in ISA_LIMITS)
    there = sys.platform == "linux" and torch.backends.mkldnn.is_available() and not limited
    return there and (by_amx or (by_avx512 and _is_known_kernel()))


@cache
def _is_of_amd() -> bool:
    return CPU_INFO.exists() and "AuthenticAMD" in CPU_INFO.read_text()


@cache
def _is_known_kernel() -> bool:
    """Whether inductor's kernel is one that can be told to use products of AVX-512."""
    try:
        import_module("torch._inductor.kernel.flex.flex_attention")
        template: Any = import_module("torch._inductor.codegen.cpp_flex_attention_template")
        return HAS_PRODUCTS in template.FLEX_ATTENTION_TEMPLATE
    except (ImportError, AttributeError):
        return False


@contextmanager
def _faster_kernel() -> Iterator[None]:
    """While it is open, inductor's attention kernels are those of :func:`compile_flex`."""
    import_module("torch._inductor.kernel.flex.flex_attention")  # the modules below don't import without it
    template: Any = import_module("torch._inductor.codegen.cpp_flex_attention_template")
    micro_gemm: Any = import_module("torch._inductor.codegen.cpp_micro_gemm")
    usual = micro_gemm.CppMicroGemmFP32Vec

    def product(name: str, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        if dtype != torch.float32:
            return usual(name, dtype, *args, **kwargs)
        source = (SIGNATURE + TRANSPOSE * name.endswith("_transpose_b") + PRODUCT).format(name=name)
        return SimpleNamespace(codegen_define=lambda kernel: source)

    # In bf16 this kernel is compiled for CPUs that have such products alone: see kernel_dtype.
    rows = _row_by_row(template.FLEX_ATTENTION_TEMPLATE).replace(HAS_PRODUCTS, "true")
    # Kernels that other code of the process compiled in the usual way must not be taken from a cache, nor ours by it.
    config: Any = import_module("torch.compiler.config")
    source = sha256((SIGNATURE + TRANSPOSE + PRODUCT + rows).encode()).hexdigest()
    tag = f"{config.cache_key_tag}sparse_prefill {source}"
    with (
        _replaced(micro_gemm, "CppMicroGemmFP32Vec", product),
        _replaced(template, "FLEX_ATTENTION_TEMPLATE", rows),
        config.patch(cache_key_tag=tag),
    ):
        yield


def _row_by_row(template: str) -> str:
    """The kernel whose threads take one row after the other; as it is, if it isn't the one that we know."""
    head, runs, tail = template.partition(RUNS)
    return head + ANY_ROW + tail.replace(LOOP, NEXT_ROW, 1) if runs and LOOP in tail else template


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    usual = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, usual)

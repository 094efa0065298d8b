"""Compile FlexAttention for CPUs: PyTorch's BLAS multiplies matrices, and each thread takes the next free row."""

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

# C++ of one product, C [M, N] = A [M, K] @ B [K, N], or C += A @ B. ``brgemm`` takes B only in this order. Keys are
# [N, K], so they are transposed into memory that each thread keeps. Inductor's kernel includes both functions' headers.
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
# Inductor's kernel gives each thread an equal run of rows of blocks, whatever the number of blocks in them.
RUNS = """  at::parallel_for(0, batchSize * num_head * qSlice, 1, [&](int64_t begin, int64_t end) {
    int64_t i = 0, j = 0, k = 0;
    at::native::data_index_init(begin, i, batchSize, j, num_head, k, qSlice);"""
LOOP = "    for ([[maybe_unused]] auto z : c10::irange(begin, end)) {"
# This one lets each thread take the next row when it is done with one, so no thread is idle while rows are left.
ANY_ROW = """  std::atomic<int64_t> next_row{0};
  at::parallel_for(0, batchSize * num_head * qSlice, 1, [&](int64_t, int64_t) {
    int64_t i = 0, j = 0, k = 0;"""
NEXT_ROW = """    for (int64_t z = next_row++; z < batchSize * num_head * qSlice; z = next_row++) {
      at::native::data_index_init(z, i, batchSize, j, num_head, k, qSlice);"""
# Inductor's kernel multiplies bf16 by ``brgemm`` only on CPUs with AMX. AVX-512 has bf16 products, too, and ``brgemm``
# takes keys and values in the same order for both.
HAS_PRODUCTS = "at::native::cpublas::could_pack(at::kBFloat16)"
ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # environment variables that limit oneDNN's instructions
_one_at_a_time = Lock()


def compile_flex(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Inductor as a backend of ``torch.compile``, with a faster CPU kernel.

    It changes inductor's kernel in three places:

    * In fp32, inductor (torch 2.13) multiplies queries and keys in generated loops: one query row at a time by 16 keys,
      which it transposes again for each row. Here ``brgemm`` multiplies them, as in SDPA and as inductor does for
      values. The C++ compiler takes half the time. Only the order of sums differs.
    * In bf16, on CPUs with AVX512_BF16 but without AMX, inductor uses such loops for both products. Here ``brgemm``
      computes both.
    * In all dtypes, inductor divides the rows of blocks equally among the threads in advance. Sparse rows differ in
      length, so here threads take one row at a time. Results are the same to the bit.

    If a torch release lacks these internals, or the changed kernel doesn't compile, inductor's kernel is used.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InductorError

    if not any(isinstance(x, Tensor) and x.device.type != "cpu" for x in inputs):
        with suppress(InductorError, ImportError, AttributeError), _one_at_a_time, _faster_kernel():
            return compile_fx(graph, inputs)
    return compile_fx(graph, inputs)


def kernel_dtype(x: Tensor) -> torch.dtype:
    """The dtype that computes attention over x fastest and at least as exactly as the dtype of x.

    GPUs and CPUs with AMX compute in half precision. AMD's CPUs with AVX512_BF16 compute bf16 in bf16. On all other
    CPUs, fp32 is faster, even with the casts before and after: on Intel's CPUs without AMX, bf16 products of
    AVX512_BF16 run at half the rate of fp32.
    """
    if x.device.type != "cpu":
        return x.dtype
    return x.dtype if x.dtype in (torch.bfloat16, torch.float16) and _has_products(x.dtype) else torch.float32


@torch.compiler.assume_constant_result  # so that estimators can be compiled, too
def _has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU has fast products in this dtype and oneDNN may use them. In bf16, oneDNN raises if it may not."""
    if dtype == torch.float16:
        return _has("_is_amx_fp16_supported")
    by_amx, by_avx512 = _has("_is_amx_tile_supported"), _has("_is_avx512_bf16_supported") and _is_amd()
    limited = any(os.environ.get(name, "ALL") not in ("ALL", "DEFAULT") for name in ISA_LIMITS)
    usable = sys.platform == "linux" and torch.backends.mkldnn.is_available() and not limited
    return usable and (by_amx or (by_avx512 and _is_known_kernel()))


def _has(query: str) -> bool:
    """The answer of a private query of ``torch.cpu``. Torch 2.11 to 2.14 have all; without one, fp32 is computed."""
    return getattr(torch.cpu, query, bool)()


@cache
def _is_amd() -> bool:
    return CPU_INFO.exists() and "AuthenticAMD" in CPU_INFO.read_text()


@cache
def _is_known_kernel() -> bool:
    """Whether inductor's kernel has the condition that decides on bf16 products."""
    try:
        import_module("torch._inductor.kernel.flex.flex_attention")
        template: Any = import_module("torch._inductor.codegen.cpp_flex_attention_template")
        return HAS_PRODUCTS in template.FLEX_ATTENTION_TEMPLATE
    except (ImportError, AttributeError):
        return False


@contextmanager
def _faster_kernel() -> Iterator[None]:
    """Replace inductor's attention kernels by those of :func:`compile_flex` inside the ``with`` block."""
    import_module("torch._inductor.kernel.flex.flex_attention")  # the modules below don't import without it
    template: Any = import_module("torch._inductor.codegen.cpp_flex_attention_template")
    micro_gemm: Any = import_module("torch._inductor.codegen.cpp_micro_gemm")
    usual = micro_gemm.CppMicroGemmFP32Vec

    def product(name: str, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
        if dtype != torch.float32:
            return usual(name, dtype, *args, **kwargs)
        source = (SIGNATURE + TRANSPOSE * name.endswith("_transpose_b") + PRODUCT).format(name=name)
        return SimpleNamespace(codegen_define=lambda kernel: source)

    # kernel_dtype chooses bf16 only for CPUs with such products, so the condition is true.
    rows = _row_by_row(template.FLEX_ATTENTION_TEMPLATE).replace(HAS_PRODUCTS, "true")
    # Inductor's caches must not exchange these kernels with those of other code in the process.
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
    """The kernel's template with threads that take one row at a time; unchanged if it isn't the known template."""
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

"""The CPU kernel has other products and another order of rows; other kernels of the process stay inductor's."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import reference
import torch
from torch._inductor.compile_fx import compile_fx

import sparse_prefill as sp
from sparse_prefill.kernel import cpu_compile, flex

import_module("torch._inductor.kernel.flex.flex_attention")  # the modules below don't import without it
cpp_micro_gemm = import_module("torch._inductor.codegen.cpp_micro_gemm")
template = import_module("torch._inductor.codegen.cpp_flex_attention_template")
USUAL = cpp_micro_gemm.CppMicroGemmFP32Vec, template.FLEX_ATTENTION_TEMPLATE


def attend(backend=cpu_compile.compile_flex):
    """Causal attention of 100 tokens in fp32 by a newly compiled kernel, and the expected output."""
    q, k, v = reference.random_qkv(q_len=100)
    prompt = sp.Prompt(q_len=100, block_size=16)
    compiled = torch.compile(flex.plain_attention, fullgraph=True, dynamic=True, backend=lambda *args: backend(*args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "compiled", lambda: compiled)
        out = sp.block_sparse_attention(q, k, v, prompt.visible(), prompt=prompt)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (cpp_micro_gemm.CppMicroGemmFP32Vec, template.FLEX_ATTENTION_TEMPLATE) == USUAL
    return out, expected


def test_only_this_kernel_multiplies_by_brgemm(monkeypatch):
    torch.testing.assert_close(*attend())
    of_one_dimension = cpu_compile.PRODUCT.replace("brgemm(M, N, K", "brgemm(M, N, 1")
    monkeypatch.setattr(cpu_compile, "PRODUCT", of_one_dimension)
    wrong, expected = attend()
    assert not torch.allclose(wrong, expected, atol=1e-2)
    torch.testing.assert_close(*attend(backend=compile_fx))


def test_threads_take_all_rows_one_at_a_time(monkeypatch):
    out, _ = attend()
    monkeypatch.setattr(cpu_compile, "ANY_ROW", cpu_compile.ANY_ROW.replace("next_row{0}", "next_row{1}"))
    without_first, expected = attend()
    assert not torch.allclose(without_first[:, 0, :16], expected[:, 0, :16], atol=1e-2)
    torch.testing.assert_close(without_first[:, 0, 16:], expected[:, 0, 16:])
    monkeypatch.setattr(cpu_compile, "RUNS", "another version's")
    in_runs, _ = attend()
    assert torch.equal(in_runs, out)


@pytest.mark.parametrize("missing", ["module", "class", "function"])
def test_with_other_internals_of_torch_inductor_compiles_its_own_kernel(monkeypatch, missing):
    def import_module(name):
        if missing == "module":
            raise ModuleNotFoundError(name)
        return object()

    if missing == "function":
        monkeypatch.setattr(cpu_compile, "PRODUCT", cpu_compile.PRODUCT.replace("brgemm", "brgemm_of_later"))
    else:
        monkeypatch.setattr(cpu_compile, "import_module", import_module)
    torch.testing.assert_close(*attend())


@pytest.mark.skipif(sys.platform != "linux", reason="bf16 products are used only on Linux")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_amx", [False, True])
def test_half_precision_is_computed_in_fp32_where_that_is_faster(monkeypatch, dtype, has_amx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx and dtype == torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: has_amx and dtype == torch.float16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert cpu_compile.kernel_dtype(torch.empty(1, dtype=dtype)) == (dtype if has_amx else torch.float32)
    assert cpu_compile.kernel_dtype(torch.empty(1, dtype=dtype, device="meta")) == dtype
    assert cpu_compile.kernel_dtype(torch.empty(1)) == torch.float32


@pytest.mark.parametrize("limit", cpu_compile.ISA_LIMITS)
def test_bf16_is_computed_in_fp32_where_onednn_may_not_use_bf16_products(monkeypatch, limit):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for name in cpu_compile.ISA_LIMITS:
        monkeypatch.delenv(name, raising=False)
    x = torch.empty(1, dtype=torch.bfloat16)
    assert cpu_compile.kernel_dtype(x) == (torch.bfloat16 if sys.platform == "linux" else torch.float32)
    monkeypatch.setenv(limit, "AVX512_CORE")
    assert cpu_compile.kernel_dtype(x) == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="bf16 products are used only on Linux")
@pytest.mark.parametrize(
    ("known", "vendor"), [(False, "AuthenticAMD"), (True, "AuthenticAMD"), (True, "GenuineIntel"), (True, None)]
)
def test_bf16_is_computed_in_bf16_where_that_is_faster_and_the_kernel_is_known(monkeypatch, tmp_path, known, vendor):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(cpu_compile, "CPU_INFO", tmp_path / "cpuinfo")
    if vendor:
        (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    cpu_compile._is_amd.cache_clear()
    if not known:
        monkeypatch.setattr(cpu_compile, "HAS_PRODUCTS", "another version's")
    cpu_compile._is_known_kernel.cache_clear()
    found = cpu_compile.kernel_dtype(torch.empty(1, dtype=torch.bfloat16))
    cpu_compile._is_known_kernel.cache_clear()
    cpu_compile._is_amd.cache_clear()
    assert found == (torch.bfloat16 if known and vendor == "AuthenticAMD" else torch.float32)
    assert cpu_compile.kernel_dtype(torch.empty(1, dtype=torch.float16)) == torch.float32


def test_the_template_uses_bf16_products_only_while_this_kernel_compiles():
    with cpu_compile._faster_kernel():
        assert cpu_compile.HAS_PRODUCTS not in template.FLEX_ATTENTION_TEMPLATE
    assert cpu_compile.HAS_PRODUCTS in template.FLEX_ATTENTION_TEMPLATE


@pytest.mark.parametrize("length", [64, 127, 129, 1000])
@pytest.mark.parametrize("dim", [32, 33])
def test_products_of_bf16_are_as_exact_as_those_of_sdpa(length, dim, monkeypatch):
    monkeypatch.setattr(cpu_compile, "_is_amd", lambda: True)  # on other CPUs they are as exact, but slower
    if not cpu_compile._has_products(torch.bfloat16):
        pytest.skip("the CPU has no products of bf16")
    q, k, v = (x.bfloat16() for x in reference.random_qkv(q_len=length, dim=dim))
    prompt = sp.Prompt(q_len=length, block_size=16)
    exact, theirs = (
        torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True).float()
        for qkv in ((q.float(), k.float(), v.float()), (q, k, v))
    )
    ours = sp.block_sparse_attention(q, k, v, prompt.visible(), prompt=prompt)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() <= 1.1 * (theirs - exact).norm()

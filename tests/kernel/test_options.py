"""Options reach only the GPU kernel, and an option that can't be used is an error that says why."""

from __future__ import annotations

from importlib import import_module

import pytest
import reference
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_prefill as sp
from sparse_prefill.kernel import flex
from sparse_prefill.kernel.options import options_for

module = import_module("sparse_prefill.kernel.options")


def options(tokens=256, kv_len=256, block_size=128, dtype=torch.bfloat16, dim=128, device="cuda", **others):
    with FakeTensorMode():
        q, v = (torch.empty(1, 2, n, dim, device=device, dtype=dtype) for n in (tokens, kv_len))
        return options_for(q, v, block_size, **{"is_plain": True, **others})


@pytest.fixture(autouse=True)
def capability(monkeypatch):
    """The compute capability of a GPU, which a test may replace."""
    found = [(8, 0)]
    monkeypatch.setattr(module, "_capability", lambda device: found[0])
    return found


@pytest.fixture
def torch_is(monkeypatch):
    return lambda version: monkeypatch.setattr(torch, "__version__", version)


def test_a_cpu_has_no_options():
    assert options(device="cpu", block_size=64) == {}
    with sp.kernel_options(BLOCK_M=64, num_warps=8):
        assert options(device="cpu") == {}


def test_torch_chooses_all_options_but_that_lengths_are_whole_tiles(torch_is):
    torch_is("2.13.0")
    assert options() == {"IS_DIVISIBLE": True}
    assert options(tokens=255, kv_len=255) == options(tokens=256, kv_len=300) == {}
    assert options(tokens=384, kv_len=384, block_size=256) == {}, "384 is no multiple of the block"


@pytest.mark.parametrize(
    ("block_size", "dtype", "dim", "tile"),
    [
        (64, torch.bfloat16, 128, (64, 64)),
        (32, torch.float16, 64, (32, 32)),
        (64, torch.bfloat16, 256, (64, 32)),
        (64, torch.float32, 96, (32, 32)),
        (16, torch.float32, 256, (16, 16)),
    ],
)
def test_small_blocks_get_tiles_that_divide_them_before_torch_2_14(block_size, dtype, dim, tile, torch_is):
    torch_is("2.13.0")
    assert options(255, 255, block_size, dtype, dim) == dict(zip(("BLOCK_M", "BLOCK_N"), tile, strict=True))
    torch_is("2.14.1")
    assert options(255, 255, block_size, dtype, dim) == {}


def test_given_options_replace_the_defaults_inside_the_block_and_blocks_nest(torch_is):
    torch_is("2.13.0")
    with sp.kernel_options(BLOCK_M=32, num_warps=8), sp.kernel_options(num_warps=4):
        assert options(255, 255, 64) == {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4}
    assert options(255, 255, 64) == {"BLOCK_M": 64, "BLOCK_N": 64}


def test_measured_tiles_apply_only_to_the_measured_kinds_of_kernels(torch_is, capability):
    torch_is("2.11.0")
    capability[0] = 9, 0
    tiles = {**module.TILES[9, 0], "USE_TMA": False}
    assert options(kv_len=32768 + 128) == {"IS_DIVISIBLE": True, **tiles, "USE_TMA": True}
    assert options() == {"IS_DIVISIBLE": True, **tiles}
    assert options(dim=96, dtype=torch.float16, block_size=256, tokens=300) == tiles
    with sp.kernel_options(BACKEND="TRITON"):
        assert options(tokens=300) == {"BACKEND": "TRITON", **tiles}
    with sp.kernel_options(num_warps=4):
        assert options(tokens=300) == {"num_warps": 4}, "with a given option, torch chooses the rest"
    for others in (
        {"is_plain": False},
        {"dim": 64},
        {"dim": 256},
        {"dtype": torch.float32},
        {"tokens": 100},
    ):
        assert not options(**{"tokens": 300, **others}), others
    assert options(block_size=64, tokens=300) == {"BLOCK_M": 64, "BLOCK_N": 64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [(4096, 4096), (1000, 4001), (129, 129)])
def test_measured_tiles_change_only_rounding_on_a_gpu(lengths, monkeypatch):
    monkeypatch.setattr(module, "_capability", torch.cuda.get_device_capability)
    q_len, kv_len = lengths
    q, k, v = (
        x.cuda().bfloat16()
        for x in reference.random_qkv(batch=2, heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len, dim=128, scale=2)
    )
    prompt = sp.Prompt(q_len=q_len, kv_len=kv_len)
    keep = sp.get_strategy("flash_prefill", min_length=0).keep(q, k, prompt)
    found = sp.block_sparse_attention(q, k, v, keep, prompt=prompt)
    with sp.kernel_options(USE_TMA=False):
        torchs = sp.block_sparse_attention(q, k, v, keep, prompt=prompt)
    torch.testing.assert_close(found, torchs, rtol=0.02, atol=0.02)
    tokens = keep.repeat_interleave(128, -2)[..., :q_len, :].repeat_interleave(128, -1)[..., :kv_len]
    mask = tokens & reference.token_mask(prompt).to(q.device)
    exact = F.scaled_dot_product_attention(*(x.float() for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)


def test_options_are_passed_to_the_kernel(monkeypatch):
    seen = []

    def attend(q, k, v, *others):
        seen.append(others[-1])
        return torch.zeros_like(q)

    def options_of(q, v, block_size, is_plain):
        return {"kv": v.shape[2], "size": block_size, "plain": is_plain}

    monkeypatch.setattr(flex, "options_for", options_of)
    for name in ("compiled", "compiled_with_modifiers"):
        monkeypatch.setattr(flex, name, lambda: attend)
    q, k, v = reference.random_qkv(q_len=41, kv_len=205)
    for softcap in (None, 30.0):
        sp.sparse_attention(q, k, v, sp.get_strategy("a_shape", block_size=16, min_length=0), softcap=softcap)
    assert seen == [{"kv": 205, "size": 16, "plain": is_plain} for is_plain in (True, False)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"BLOCK_K": 1}, "Unknown kernel options BLOCK_K. There are: BACKEND"),
        ({"ROWS_GUARANTEED_SAFE": True}, "Unknown kernel options ROWS_GUARANTEED_SAFE"),
        ({"BACKEND": "CUDNN"}, "BACKEND must be one of AUTO, TRITON, FLASH"),
        ({"BLOCK_M": 128}, "BLOCK_M must divide the block size of 64"),
    ],
)
def test_an_error_names_a_wrong_option(given, message):
    with pytest.raises(ValueError, match=message), sp.kernel_options(**given):
        options(block_size=64)


def test_a_backend_on_a_cpu_is_an_error():
    with sp.kernel_options(BACKEND="TRITON"):
        assert options(255, 255) == {"BACKEND": "TRITON"}
        with pytest.raises(ValueError, match="BACKEND='TRITON' is for CUDA devices, and q is on cpu"):
            options(device="cpu")


def test_an_error_says_what_the_flash_backend_needs(torch_is, capability, monkeypatch):
    def fails(message, **case):
        with pytest.raises(ValueError, match=message), sp.kernel_options(BACKEND="FLASH"):
            options(**case)

    torch_is("2.13.0")
    fails("needs torch 2.14 or newer, and this is 2.13.0")
    torch_is("2.14.1")
    fails("flash-attn-4, which isn't installed")
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    fails("needs compute capability 9.0, and cuda:0 has 8.0")
    capability[0] = 9, 0
    fails("got float32", dtype=torch.float32)
    fails("blocks of 128 tokens, got 64", block_size=64)
    with sp.kernel_options(BACKEND="FLASH"):
        assert options() == {"BACKEND": "FLASH"}

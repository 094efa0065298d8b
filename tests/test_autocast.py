"""Under ``torch.autocast``, attention equals that of inputs cast to its dtype."""

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill import registry

HEADS = {"seer_attention"}  # needs weights


def strategies():
    return [name for name in (*sp.list_strategies(), *sp.list_wrappers()) if name not in HEADS]


def small(name):
    options = {"min_length": 0, "block_size": 64}
    if name in sp.list_wrappers():
        return sp.get_strategy(name, of={"name": "a_shape", "sink": 64, "local": 64, **options})
    return sp.get_strategy(name, **(options if name not in ("dense",) else {"block_size": 64}))


@pytest.fixture(scope="module")
def qkv():
    return reference.random_qkv(1, 4, 2, 512, dim=64, scale=2)


@pytest.mark.parametrize("name", strategies())
def test_attention_under_autocast_equals_attention_of_inputs_in_its_dtype(name, qkv):
    strategy, prompt = small(name), sp.Prompt(512, block_size=64)
    want = sp.sparse_attention(*(x.bfloat16() for x in qkv), strategy, prompt=prompt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sp.sparse_attention(*qkv, strategy, prompt=prompt)
        mixed = sp.sparse_attention(*qkv[:2], qkv[2].bfloat16(), strategy, prompt=prompt)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    assert torch.equal(mixed, want)


@pytest.mark.parametrize("name", strategies())
def test_tables_under_autocast_equal_tables_of_inputs_in_its_dtype(name, qkv):
    strategy, prompt = small(name), sp.Prompt(512, block_size=64)
    want = strategy.keep(*(x.bfloat16() for x in qkv[:2]), prompt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(strategy.keep(*qkv[:2], prompt), want)


@pytest.mark.parametrize("name", registry.estimators.names())
def test_estimators_keep_their_precision_under_autocast(name, qkv):
    estimator, prompt = sp.get_estimator(name), sp.Prompt(512, block_size=64)
    want = estimator(*(x.bfloat16() for x in qkv[:2]), prompt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = estimator(*qkv[:2], prompt)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, want)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_dense_attention_accepts_mixed_dtypes_under_autocast(qkv):
    prompt = sp.Prompt(512, window=100)
    want = sp.dense_attention(*(x.bfloat16() for x in qkv), prompt=prompt)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sp.dense_attention(*qkv[:2], qkv[2].bfloat16(), prompt=prompt), want)


def test_without_autocast_mixed_dtypes_are_refused(qkv):
    with pytest.raises(ValueError, match="one dtype"):
        sp.sparse_attention(*qkv[:2], qkv[2].bfloat16(), "a_shape")


@pytest.mark.parametrize("scale", [4.0, 64.0])
def test_a_large_scale_selects_the_same_blocks_in_float16_and_float32(scale):
    q, k, v = reference.random_qkv(1, 4, 2, 512, dim=64, scale=300, dtype=torch.float16)
    strategy = sp.get_strategy("flex_prefill", min_length=0, block_size=64)
    densities = []
    for dtype in (torch.float16, torch.float32):
        with sp.record() as calls:
            sp.sparse_attention(q.to(dtype), k.to(dtype), v.to(dtype), strategy, scale=scale)
        densities.append(calls[0].density)
    torch.testing.assert_close(*densities, rtol=0, atol=0.01)

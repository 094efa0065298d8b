"""NaN and infinity reach all rows that may attend to them, kept or not, and no other rows."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from test_strategies import small

import sparse_prefill as sp

PROMPTS = {
    "whole": sp.Prompt(100, block_size=16),
    "chunk": sp.Prompt(41, 205, block_size=16),
    "left padding": sp.Prompt(100, block_size=16, left_padding=[37, 0]),
    "right padding": sp.Prompt(100, block_size=16, right_padding=[37, 0]),
    "documents": sp.Prompt(100, block_size=16, documents=[0] * 40 + [1] * 30 + [2] * 30),
    "window": sp.Prompt(100, block_size=16, window=40),
    "decode": sp.Prompt(1, 100, block_size=16, left_padding=[60, 0]),
    "one block": sp.Prompt(10, block_size=16),
}
A_SHAPE = sp.get_strategy("a_shape", block_size=16, min_length=0, sink=16, local=16)


def expected(q, k, v, prompt, softcap=None):
    """Softmax of each row over only the keys that it may attend to."""
    mask, group = reference.token_mask(prompt, q.shape[0]), q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = mask[b, row].nonzero().flatten()
        if len(keys):
            logits = k[b, h // group, keys].double() @ q[b, h, row].double() / math.sqrt(q.shape[3])
            logits = logits if softcap is None else softcap * (logits / softcap).tanh()
            out[b, h, row] = logits.softmax(0) @ v[b, h // group, keys].double()
    return out


def same_faults(found, want, which, value):
    """Whether both are faulty in the same places. Infinite values may give NaN or infinity, by their weight."""
    by = torch.isfinite if which == 2 and math.isinf(value) else lambda x: ~x.isnan()
    return torch.equal(by(found), by(want))


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_one_entry_reaches_the_rows_that_see_its_token(name, value, which):
    prompt = PROMPTS[name]
    for token in {5, prompt.q_len // 2, prompt.q_len - 1} & set(range(prompt.q_len)):
        qkv = reference.random_qkv(2, 6, 2, prompt.q_len, prompt.kv_len)
        qkv[which][1, 1, token, 3] = qkv[which][0, 0, token, 2] = value
        want = expected(*qkv, prompt)
        assert same_faults(sp.sparse_attention(*qkv, A_SHAPE, prompt=prompt), want, which, value)
        assert same_faults(sp.dense_attention(*qkv, prompt=prompt), want, which, value)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("name", sp.list_strategies())
def test_no_strategy_hides_nan(name, which):
    qkv = reference.random_qkv(q_len=333)
    qkv[which][0, 1, 150, 3] = math.nan
    want = expected(*qkv, sp.Prompt(333))
    assert 0 < want.isnan().sum() < want.numel()
    assert same_faults(sp.sparse_attention(*qkv, small(name)), want, which, math.nan)


@pytest.mark.parametrize("name", sp.list_strategies())
def test_keys_that_are_all_nan_or_infinite_raise_no_error(name):
    q, k, v = reference.random_qkv(q_len=333)
    for value in (math.nan, math.inf):
        assert sp.sparse_attention(q, torch.full_like(k, value), v, small(name)).isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_a_soft_cap_makes_infinite_logits_finite(which, value):
    prompt = PROMPTS["window"]
    qkv = reference.random_qkv(2, 6, 2, 100)
    qkv[which][1, 1, 50, 3] = value
    found = sp.sparse_attention(*qkv, A_SHAPE, prompt=prompt, softcap=20.0)
    assert same_faults(found, expected(*qkv, prompt, 20.0), which, value)


def test_rows_that_do_not_see_nan_keep_their_values():
    q, k, v = reference.random_qkv(q_len=100)
    before = sp.sparse_attention(q, k, v, A_SHAPE)
    for x in (k, v):
        with_fault = x.clone()
        with_fault[0, 0, 60] = math.nan
        pair = (with_fault, v) if x is k else (k, with_fault)
        found = sp.sparse_attention(q, *pair, A_SHAPE)
        assert found[:, :3, 60:].isnan().all()
        assert torch.equal(found[:, :3, :60], before[:, :3, :60])
        assert torch.equal(found[:, 3:], before[:, 3:])
        assert x[0, 0, 60].isfinite().all(), "the arguments aren't changed"


def test_padding_may_hold_anything():
    prompt = sp.Prompt(100, block_size=16, left_padding=[37])
    q, k, v = reference.random_qkv(q_len=100)
    keep = A_SHAPE.keep(q, k, prompt)
    last = q[:, :, -1:], sp.Prompt(1, 100, block_size=16, left_padding=[37])

    def attended():
        yield sp.sparse_attention(q, k, v, A_SHAPE, prompt=prompt)
        yield sp.block_sparse_attention(q, k, v, keep, prompt=prompt)
        yield sp.dense_attention(q, k, v, prompt=prompt)
        yield sp.dense_attention(last[0], k, v, prompt=last[1])

    clean = list(attended())
    for x in (q, k, v):
        x[:, :, :37] = math.nan
    for found, want in zip(attended(), clean, strict=True):
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)

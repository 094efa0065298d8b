"""Estimators equal plain loops over tokens, return fp32 scores, and score only real tokens."""

from dataclasses import replace
from importlib import import_module

import pytest
import reference
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_prefill as sp
from sparse_prefill import registry
from sparse_prefill.estimators import key_means, pooled, query_means

PROMPTS = {
    "odd length": sp.Prompt(333, block_size=16),
    "whole blocks": sp.Prompt(160, block_size=16),
    "more key blocks than head_dim": sp.Prompt(600, block_size=16),
    "chunk": sp.Prompt(64, 208, 16),
    "chunk off the grid": sp.Prompt(41, 205, 16),
    "chunk under a block": sp.Prompt(5, 205, 16),
    "padding": sp.Prompt(150, block_size=16, left_padding=[37, 0]),
    "padded chunk": sp.Prompt(41, 205, 16, left_padding=[20, 170]),
    "long padding": sp.Prompt(333, block_size=16, left_padding=[331]),
    "documents": sp.Prompt(150, block_size=16, documents=[0] * 70 + [1] * 5 + [2] * 75),
    "one token": sp.Prompt(1, block_size=16),
}
every_prompt = pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
every_estimator = pytest.mark.parametrize("name", registry.estimators.names())


def inputs(prompt, dtype=torch.float32, seed=0):
    q, k, _ = reference.random_qkv(prompt.batch, 4, 2, prompt.q_len, prompt.kv_len, scale=4, dtype=dtype, seed=seed)
    return q, k


def tensors(scores):
    return list(scores) if isinstance(scores, tuple) else [scores]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_estimator
def test_scores_are_fp32_for_inputs_of_any_dtype(name, dtype):
    prompt = PROMPTS["odd length"]
    scores = sp.get_estimator(name)(*inputs(prompt, dtype), prompt)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in tensors(scores))


@pytest.mark.parametrize("situation", ["padding", "padded chunk", "long padding"])
@every_estimator
def test_padding_is_neither_scored_nor_pooled(name, situation):
    prompt = PROMPTS[situation]
    estimator = sp.get_estimator(name)
    q, k = inputs(prompt)
    before = tensors(estimator(q, k, prompt))
    for b, padding in enumerate(prompt.left_padding.tolist()):
        k[b, :, :padding] = 1e4
        q[b, :, : max(padding - prompt.offset, 0)] = 1e4
    after = tensors(estimator(q, k, prompt))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"chunk": 3}])
@every_prompt
def test_true_mass_is_the_attention_summed_over_blocks(prompt, options):
    q, k = inputs(prompt)
    mass = sp.get_estimator("true_mass", **options)(q, k, prompt)
    torch.testing.assert_close(mass.double(), reference.block_mass(q, k, prompt), rtol=0, atol=1e-6)
    real = prompt.visible().any(-1).expand(*mass.shape[:-1])
    torch.testing.assert_close(mass.sum(-1), real.float(), rtol=0, atol=1e-5)


@every_prompt
def test_pooled_attention_is_the_softmax_over_visible_blocks_between_means_of_real_tokens(prompt):
    q, k = inputs(prompt)
    scores = sp.get_estimator("pooled_attention")(q, k, prompt)
    torch.testing.assert_close(scores.double(), reference.pooled_attention(q, k, prompt), rtol=0, atol=1e-6)
    assert (scores[~prompt.visible().expand_as(scores)] == 0).all()


def attention_of_finer_means(q, k, prompt):
    """Attention between means of 16 tokens in blocks of 64: float64 [B, H, n_q, n_k]."""
    fine = reference.pooled_attention(q, k, replace(prompt, block_size=16))
    found = torch.zeros(*fine.shape[:2], prompt.n_q, prompt.n_k, dtype=torch.float64)
    for i, j in torch.cartesian_prod(*map(torch.arange, fine.shape[2:])).tolist():
        found[:, :, i // 4, j // 4] += fine[:, :, i, j]
    return found / found.sum(-1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("max_logits", [2**21, 1])
@every_prompt
def test_scores_of_finer_means_are_summed_over_keys_and_averaged_over_queries(prompt, max_logits, monkeypatch):
    monkeypatch.setattr(pooled, "MAX_LOGITS_CPU", max_logits)
    q, k = inputs(prompt)
    prompt = replace(prompt, block_size=64)
    scores = sp.get_estimator("pooled_attention", pool_size=16)(q, k, prompt)
    torch.testing.assert_close(scores.double(), attention_of_finer_means(q, k, prompt), rtol=0, atol=1e-6)
    assert (scores[~prompt.visible().expand_as(scores)] == 0).all()


def test_a_pool_size_equal_to_the_block_size_is_the_default():
    prompt = PROMPTS["odd length"]
    q, k = inputs(prompt)
    default, by_size = (sp.get_estimator("pooled_attention", pool_size=size)(q, k, prompt) for size in (None, 16))
    assert torch.equal(default, by_size)


@pytest.mark.parametrize("pool_size", [0, 8, 24, 16.0, True, "16"])
def test_a_pool_size_must_be_a_power_of_two_and_at_least_16(pool_size):
    with pytest.raises(ValueError, match="pool_size must be a power of two, at least 16 tokens"):
        sp.get_estimator("pooled_attention", pool_size=pool_size)


def test_a_pool_size_over_the_block_size_is_refused():
    prompt = PROMPTS["odd length"]
    with pytest.raises(
        ValueError, match="must be at most the block size, got 32 and block_size=16: give a smaller one"
    ):
        sp.get_estimator("pooled_attention", pool_size=32)(*inputs(prompt), prompt)


@every_prompt
def test_block_means_are_over_real_tokens_only(prompt):
    q, k = inputs(prompt)
    for means, x, queries in ((query_means, q, True), (key_means, k, False)):
        got = means(x, prompt)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), reference.block_means(x, prompt, queries), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 5])
@every_prompt
def test_representative_masses_are_the_last_queries_attention_by_key_block_and_by_diagonal(prompt, stride):
    q, k = inputs(prompt)
    got = sp.get_estimator("representative", stride=stride)(q, k, prompt)
    want = reference.representative(q, k, prompt, stride)
    for x, y in zip(got, want, strict=True):
        rtol = 1e-5 if x is got.peak else 0  # the peak comes from one query, so no mean averages out its rounding
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=1e-6)
    for mass in (got.vertical, got.slash):
        torch.testing.assert_close(mass.sum(-1), torch.ones(mass.shape[:2]), rtol=0, atol=1e-5)


@every_estimator
def test_scores_of_bf16_inputs_equal_scores_of_the_same_values_in_fp32(name, monkeypatch):
    monkeypatch.setattr(import_module("sparse_prefill.estimators.attention_mass"), "kernel_dtype", lambda x: None)
    prompt = PROMPTS["more key blocks than head_dim"]
    q, k = inputs(prompt, torch.bfloat16)
    estimator = sp.get_estimator(name)
    low, high = estimator(q, k, prompt), estimator(q.float(), k.float(), prompt)
    for x, y in zip(tensors(low), tensors(high), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("situation", ["more key blocks than head_dim", "chunk off the grid", "padding", "one token"])
@pytest.mark.parametrize("name", ["representative", "antidiagonal"])
def test_rounded_logits_change_scores_only_a_little(name, situation, offset, monkeypatch):
    """Even if all logits of a query are so large that bf16 rounds them to steps of 16."""
    monkeypatch.setattr(import_module("sparse_prefill.estimators.attention_mass"), "kernel_dtype", lambda x: x.dtype)
    prompt = PROMPTS[situation]
    q, k = inputs(prompt, torch.bfloat16)
    q, k = q.abs() + 4, k + offset
    estimator = sp.get_estimator(name)
    low, high = tensors(estimator(q, k, prompt))[0], tensors(estimator(q.float(), k.float(), prompt))[0]
    assert (low - high).abs().sum(-1).max() < 0.05


@pytest.mark.parametrize("name", ["representative", "true_mass"])
def test_peaked_logits_give_blocks_of_zero_mass_and_no_nan(name):
    prompt = PROMPTS["more key blocks than head_dim"]
    q, k = inputs(prompt)
    scores = tensors(sp.get_estimator(name)(q * 100, k, prompt))
    assert all(x.isfinite().all() for x in scores)
    assert (scores[0] == 0).any()


def test_prompts_of_more_keys_than_the_square_of_the_head_dimension_are_scored_correctly():
    prompt = sp.Prompt(q_len=16, kv_len=16 * 16 * 16 + 1, block_size=16)
    q, k = inputs(prompt)
    got = sp.get_estimator("representative")(q, k, prompt)
    torch.testing.assert_close(got.vertical.double(), reference.representative(q, k, prompt)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 5000, 50_000])
@pytest.mark.parametrize("situation", ["padding", "chunk off the grid"])
@pytest.mark.parametrize("name", ["representative", "sampled_mass", "true_mass", "antidiagonal"])
def test_masses_do_not_depend_on_the_limit_of_logits_in_memory(name, situation, limit, monkeypatch):
    prompt = PROMPTS[situation]
    q, k = inputs(prompt)
    want = tensors(sp.get_estimator(name)(q, k, prompt))
    module, sizes = import_module("sparse_prefill.estimators.attention_mass"), []

    def group_logits(q, k, scale, rounded):
        sizes.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return pooled.group_logits(q, k, scale, rounded=rounded)

    monkeypatch.setattr(module, "group_logits", group_logits)
    monkeypatch.setattr(module, "MAX_LOGITS_CPU", limit)
    monkeypatch.setattr(module, "MIN_ROWS", 1)
    got = tensors(sp.get_estimator(name)(q, k, prompt))
    assert max(sizes) <= max(limit, prompt.batch * 2 * prompt.kv_len)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        rtol = 1e-5 if (name, i) == ("representative", 3) else 0  # the peak: no mean averages out its rounding
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_logits_are_fp32_on_every_device(device, dtype):
    with FakeTensorMode():  # accepts devices that this machine lacks
        q, k = (torch.empty(2, heads, 5, 16, dtype=dtype, device=device) for heads in (6, 2))
        logits, rest = pooled.group_logits(q, k, 0.25)
    assert (logits.dtype, logits.device.type, tuple(logits.shape)) == (torch.float32, device, (2, 6, 5, 5))
    assert rest == (0.25 if device == "cuda" and dtype != torch.float32 else 1.0)

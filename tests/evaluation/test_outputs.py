"""The error of an output against attention in float64."""

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill import evaluation
from sparse_prefill.core.logits import Logits

BLOCKS = [1, 4, 6]


@pytest.fixture(params=["chunk", "window"])
def case(request):
    window = 40 if request.param == "window" else None
    q, k, v = reference.random_qkv(q_len=100, kv_len=150, scale=3)
    prompt = sp.Prompt(q_len=100, kv_len=150, block_size=16, window=window)
    keep = ((torch.rand(1, 6, prompt.n_q, prompt.n_k) < 0.4) | prompt.diagonal()) & prompt.visible()
    return q, k, v, prompt, reference.sparse_attention(q, k, v, keep, prompt)


def rows_of(prompt):
    return [row for block in BLOCKS for row in reference.query_block(prompt, block)]


def test_output_error_is_the_norm_of_the_difference_over_that_of_dense_attention(case):
    q, k, v, prompt, out = case
    rows = rows_of(prompt)
    dense = reference.dense_attention(q, k, v, prompt)[:, :, rows]
    expected = (out[:, :, rows] - dense).norm(dim=(2, 3)) / dense.norm(dim=(2, 3))
    found = evaluation.output_error(q, k, v, out.float(), prompt, BLOCKS)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
    assert bool((found > 0.05).all())


def test_squared_errors_of_the_heads_add_up_to_the_error_of_the_layer(case):
    q, k, v, prompt, out = case
    rows = rows_of(prompt)
    dense = reference.dense_attention(q, k, v, prompt)[:, :, rows]
    difference, norm = evaluation.squared_error(q, k, v, out.float(), prompt, BLOCKS)
    expected = (out[:, :, rows] - dense).norm() / dense.norm()
    assert float((difference.sum() / norm.sum()).sqrt()) == pytest.approx(float(expected), abs=1e-5)


def test_dense_attention_has_no_error(case):
    q, k, v, prompt, _ = case
    dense = reference.dense_attention(q, k, v, prompt).float()
    assert float(evaluation.output_error(q, k, v, dense, prompt, BLOCKS).max()) < 1e-5


def test_the_reference_uses_the_soft_cap_sinks_and_scale_of_the_layer():
    q, k, v = reference.random_qkv(q_len=64, scale=3)
    prompt = sp.Prompt(q_len=64, block_size=16)
    sinks = torch.linspace(-1, 4, 6)
    logits = q.double() @ k.double().repeat_interleave(3, 1).transpose(2, 3) * 0.5
    logits = (5 * (logits / 5).tanh()).masked_fill(~reference.token_mask(prompt)[:, None], -torch.inf)
    with_sink = torch.cat([logits, sinks.double().view(1, 6, 1, 1).expand(-1, -1, 64, -1)], dim=-1).softmax(-1)
    dense = (with_sink[..., :-1] @ v.double().repeat_interleave(3, 1)).float()
    capped = Logits(scale=0.5, softcap=5.0, sinks=sinks)
    blocks = range(4)
    assert float(evaluation.output_error(q, k, v, dense, prompt, blocks, capped).max()) < 1e-5
    assert float(evaluation.output_error(q, k, v, dense, prompt, blocks, Logits(scale=0.5)).min()) > 0.01


def test_the_reference_is_exact_for_bf16_inputs():
    q, k, v = reference.random_qkv(q_len=64, dtype=torch.bfloat16)
    prompt = sp.Prompt(q_len=64, block_size=16)
    exact = reference.dense_attention(q, k, v, prompt)
    assert float(evaluation.output_error(q, k, v, exact.float(), prompt, [3]).max()) < 1e-5
    assert 1e-4 < float(evaluation.output_error(q, k, v, exact.bfloat16(), prompt, [3]).max()) < 1e-2


def test_outputs_and_blocks_that_do_not_fit_are_refused(case):
    q, k, v, prompt, out = case
    with pytest.raises(ValueError, match=r"out must be of shape \[1, 6, 100, 16\]"):
        evaluation.output_error(q, k, v, out[:, :3], prompt, BLOCKS)
    with pytest.raises(ValueError, match="query_blocks must be some of 0 to 6"):
        evaluation.output_error(q, k, v, out, prompt, [7])

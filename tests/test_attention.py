"""sparse_attention: sparse output at any length, with a handful of compiled kernels."""

import subprocess
import sys

import pytest
import reference
import torch
import torch.nn.functional as F
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

import sparse_prefill as sp
from sparse_prefill.kernel import flex

A_SHAPE = sp.get_strategy("a_shape", block_size=16, sink=16, local=32, min_length=0)
FLEX = sp.get_strategy("flex_prefill", block_size=16, min_length=0, gamma=0.5, tau=0, min_budget=1)


def graphs():
    """Graphs compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def assert_sparse(out, q, k, v, strategy, prompt, scale=None, atol=1e-5):
    """Check that the output equals the sparse reference and, if a block is skipped, differs from dense attention."""
    want, skipped = reference.sparse_by_pieces(q, k, v, strategy, prompt, scale)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=atol)
    if skipped:
        assert (out - reference.dense_attention(q, k, v, prompt, scale)).abs().max() > 100 * atol


# Few compiled kernels, never a silent dense run ----------------------------------------------------------------


@pytest.mark.parametrize("strategy", [A_SHAPE, FLEX], ids=["one table for all heads", "a table for each head"])
def test_fifty_prompt_lengths_share_one_kernel_and_stay_sparse(strategy):
    before = graphs()
    for tokens in range(20, 320, 6):
        q, k, v = reference.random_qkv(q_len=tokens, scale=4, seed=tokens)
        out = sp.sparse_attention(q, k, v, strategy)
        assert_sparse(out, q, k, v, strategy, sp.Prompt(q_len=tokens, block_size=16))
    assert graphs() - before <= 1


def test_chunk_lengths_and_offsets_share_the_kernels_of_whole_prompts():
    q, k, v = reference.random_qkv(q_len=100, scale=4)
    sp.sparse_attention(q, k, v, FLEX)
    before = graphs()
    for q_len, kv_len in ((40, 200), (48, 208), (33, 150), (100, 101), (129, 333), (200, 300), (17, 64), (90, 91)):
        q, k, v = reference.random_qkv(q_len=q_len, kv_len=kv_len, scale=4)
        out = sp.sparse_attention(q, k, v, FLEX)
        assert_sparse(out, q, k, v, FLEX, sp.Prompt(q_len, kv_len, 16))
    assert graphs() == before


def test_batch_sizes_and_paddings_share_a_few_kernels():
    before = graphs()
    for batch in (2, 3, 5):
        q, k, v = reference.random_qkv(batch=batch, q_len=100, scale=4)
        for padding in (list(range(batch)), [70] * batch):
            prompt = sp.Prompt(q_len=100, block_size=16, left_padding=padding)
            assert_sparse(sp.sparse_attention(q, k, v, FLEX, prompt=prompt), q, k, v, FLEX, prompt)
    assert graphs() - before <= 2


def test_past_the_recompile_limit_it_raises_instead_of_attending_densely(monkeypatch):
    q, k, v = reference.random_qkv(q_len=100)
    sp.sparse_attention(q, k, v, A_SHAPE)
    monkeypatch.setattr(flex, "RECOMPILE_LIMIT", 1)
    q, k, v = reference.random_qkv(heads=5, kv_heads=5, q_len=100, dim=24)  # head count and dim that no other test uses
    with pytest.raises(FailOnRecompileLimitHit):
        sp.sparse_attention(q, k, v, A_SHAPE)


def test_compiler_settings_of_the_process_do_not_change():
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    q, k, v = reference.random_qkv(q_len=100)
    sp.sparse_attention(q, k, v, A_SHAPE)
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit) == limits


def test_importing_compiles_nothing_and_loads_no_extra():
    program = """
import os, sys, torch
def refuse(*args, **kwargs): raise AssertionError("compiled at import")
torch.compile = refuse
environment, defaults = dict(os.environ), (torch.get_default_dtype(), torch.is_grad_enabled())
import sparse_prefill
sparse_prefill.list_strategies()
assert dict(os.environ) == environment and (torch.get_default_dtype(), torch.is_grad_enabled()) == defaults
extras = "torchtune torchao transformers accelerate matplotlib gguf tokenizers safetensors"
print([name for name in extras.split() if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


# Inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_attention_runs_without_gradients(mode):
    q, k, v = reference.random_qkv(q_len=100, scale=4)
    want = sp.sparse_attention(q, k, v, A_SHAPE)
    with mode():
        out = sp.sparse_attention(q.requires_grad_(), k, v, A_SHAPE)
    assert torch.equal(out, want)


def test_memory_layout_does_not_change_the_output():
    q, k, v = reference.random_qkv(q_len=100, scale=4)
    want = sp.sparse_attention(q, k, v, FLEX)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    by_dimension = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for layout in (by_token, by_dimension):
        assert not any(x.is_contiguous() for x in layout)
        torch.testing.assert_close(sp.sparse_attention(*layout, FLEX), want, rtol=0, atol=1e-6)


def test_keys_may_be_a_slice_of_a_longer_cache():
    q, k, v = reference.random_qkv(q_len=41, kv_len=205, scale=4)
    k_cache, v_cache = (torch.full((1, 2, 400, 16), float("nan")) for _ in range(2))
    k_cache[:, :, :205], v_cache[:, :, :205] = k, v
    out = sp.sparse_attention(q, k_cache[:, :, :205], v_cache[:, :, :205], FLEX)
    assert_sparse(out, q, k, v, FLEX, sp.Prompt(41, 205, 16))


def test_values_may_have_another_width_than_keys():
    q, k, v = reference.random_qkv(q_len=100, scale=4)
    v = torch.cat([v, v[..., :8]], -1)
    out = sp.sparse_attention(q, k, v, A_SHAPE)
    assert out.shape == (1, 6, 100, 24)
    assert_sparse(out, q, k, v, A_SHAPE, sp.Prompt(q_len=100, block_size=16))


def test_head_dims_need_not_be_powers_of_two():
    q, k, v = reference.random_qkv(q_len=100, dim=40, scale=4)
    assert_sparse(sp.sparse_attention(q, k, v, FLEX), q, k, v, FLEX, sp.Prompt(q_len=100, block_size=16))


def test_the_default_block_size_is_128():
    q, k, v = reference.random_qkv(heads=2, kv_heads=1, q_len=1100, scale=4)
    strategy = sp.get_strategy("a_shape", sink=1, local=200, min_length=0)
    assert_sparse(sp.sparse_attention(q, k, v, strategy), q, k, v, strategy, sp.Prompt(q_len=1100))


def test_scale_applies_to_the_logits_and_the_scores():
    q, k, v = reference.random_qkv(q_len=200)
    out = sp.sparse_attention(q, k, v, FLEX, scale=1.25)
    assert_sparse(out, q, k, v, FLEX, sp.Prompt(q_len=200, block_size=16), scale=1.25)
    scaled = FLEX.keep(q * 1.25 * 4, k)
    assert not torch.equal(scaled, FLEX.keep(q, k)), "these inputs distinguish the scales"
    with sp.record(lambda call, tensors, prompt: seen.append(tensors.keep)):
        seen = []
        sp.sparse_attention(q, k, v, FLEX, scale=1.25)
    assert torch.equal(seen[0], scaled)


def test_strategies_may_be_given_by_name_and_flex_prefill_is_the_default():
    q, k, v = reference.random_qkv(heads=2, kv_heads=1, q_len=1100, scale=4)
    with sp.record() as calls:
        default = sp.sparse_attention(q, k, v)
        named = sp.sparse_attention(q, k, v, "flex_prefill")
        sp.sparse_attention(q, k, v, "a_shape")
    assert torch.equal(default, named)
    assert [call.strategy for call in calls] == ["flex_prefill", "flex_prefill", "a_shape"]


def test_one_prompt_may_be_used_for_every_layer():
    prompt = sp.Prompt(q_len=150, block_size=16, left_padding=[20, 3])
    for layer in range(2):
        q, k, v = reference.random_qkv(batch=2, q_len=150, scale=4, seed=layer)
        assert_sparse(sp.sparse_attention(q, k, v, FLEX, prompt=prompt), q, k, v, FLEX, prompt)


# Documented dense runs -----------------------------------------------------------------------------------------


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_whole_prompts_run_dense_as_sdpa_does():
    q, k, v = reference.random_qkv(q_len=333)
    assert torch.equal(sp.sparse_attention(q, k, v, "dense"), sdpa(q, k, v))
    assert torch.equal(sp.dense_attention(q, k, v, prompt=sp.Prompt(q_len=333)), sdpa(q, k, v))


def test_prompts_shorter_than_sixteen_blocks_run_dense():
    q, k, v = reference.random_qkv(q_len=255)
    assert torch.equal(sp.sparse_attention(q, k, v, sp.get_strategy("a_shape", block_size=16)), sdpa(q, k, v))


@pytest.mark.parametrize(
    "prompt",
    [
        sp.Prompt(41, 205, 16),
        sp.Prompt(1, 205, 16),
        sp.Prompt(5, 11, 16),
        sp.Prompt(205, 205, 16, left_padding=[60]),
        sp.Prompt(1, 205, 16, left_padding=[60]),
        sp.Prompt(11, 11, 16, left_padding=[5]),
        sp.Prompt(205, 205, 16, documents=[0] * 100 + [1] * 105),
        sp.Prompt(1, 205, 16, documents=[0] * 100 + [1] * 105),
        sp.Prompt(11, 11, 16, documents=[0] * 5 + [1] * 6),
    ],
    ids=[f"{kind}, {q}" for kind in ("chunk", "padding", "documents") for q in ("many", "decode", "one block")],
)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_dense_attention_supports_every_kind_of_prompt(prompt, scale):
    q, k, v = reference.random_qkv(q_len=prompt.q_len, kv_len=prompt.kv_len)
    want = reference.dense_attention(q, k, v, prompt, scale)
    for out in (
        sp.dense_attention(q, k, v, prompt=prompt, logits=sp.Logits(scale=scale)),
        sp.sparse_attention(q, k, v, sp.get_strategy("dense", block_size=16), prompt=prompt, scale=scale),
    ):
        torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", [None, [60, 205]])
def test_a_single_query_attends_densely(padding):
    q, k, v = reference.random_qkv(batch=2, q_len=1, kv_len=205)
    prompt = sp.Prompt(1, 205, 16, left_padding=padding)
    out = sp.sparse_attention(q, k, v, A_SHAPE, prompt=prompt)
    want = reference.dense_attention(q, k, v, prompt)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


# Tables given by the caller ------------------------------------------------------------------------------------


def test_keeping_all_visible_blocks_equals_dense_attention():
    q, k, v = reference.random_qkv(q_len=333, scale=4)
    prompt = sp.Prompt(q_len=333, block_size=16)
    out = sp.block_sparse_attention(q, k, v, prompt.visible(), prompt=prompt)
    torch.testing.assert_close(out, sdpa(q, k, v), rtol=0, atol=1e-5)


def test_rows_without_kept_blocks_are_zero():
    q, k, v = reference.random_qkv(q_len=333)
    prompt = sp.Prompt(q_len=333, block_size=16)
    keep = prompt.visible().clone()
    keep[:, :, 5] = False
    out = sp.block_sparse_attention(q, k, v, keep, prompt=prompt)
    assert (out[:, :, 80:96] == 0).all()
    assert out.isfinite().all()


def test_each_row_of_the_batch_may_have_its_own_table():
    q, k, v = reference.random_qkv(batch=2, q_len=150)
    prompt = sp.Prompt(q_len=150, block_size=16)
    keep = (torch.rand(2, 6, 10, 10) < 0.3) & prompt.visible() | prompt.diagonal()
    out = sp.block_sparse_attention(q, k, v, keep, prompt=prompt)
    want = reference.sparse_attention(q, k, v, keep, prompt)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sp.list_strategies())
def test_the_default_min_length_on_a_gpu_is_the_crossover_of_gpus(name):
    strategy = sp.get_strategy(name)
    if strategy.dense_reason(sp.Prompt(1 << 20, block_size=strategy.block_size)):
        pytest.skip("always dense")
    least = type(strategy).crossover_of_gpu
    for device in ("cuda", torch.device("cuda:1")):
        at, below = (sp.Prompt(n, block_size=strategy.block_size) for n in (least, least - 1))
        assert strategy.dense_reason(below, device) == "min_length"
        assert strategy.dense_reason(at, device) is None
    given = sp.get_strategy(name, min_length=9000)
    long = sp.Prompt(9000, block_size=strategy.block_size)
    assert given.dense_reason(long, "cuda") == given.dense_reason(long, "cpu") is None

"""Mean correction equals its formula, and does not affect calls without segments."""

import math

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill import Segment
from sparse_prefill.kernel import flex
from sparse_prefill.kernel.block_lists import block_tables

A_SHAPE = {"name": "a_shape", "sink": 16, "local": 32, "block_size": 16, "min_length": 0}
POOLED = {"name": "mean_pool", "share": 0.5, "block_size": 16, "min_length": 0}


def corrected(q, k, v, keep, prompt, scale=None):
    """Attention over kept blocks and over the means of fully visible blocks that aren't kept."""
    size, group = prompt.block_size, q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keep = keep.expand(*q.shape[:2], -1, -1)
    tokens, whole = reference.token_mask(prompt, len(q)), reference.fully_visible(prompt, len(q))
    k_means, v_means = (reference.block_means(x, prompt, False) for x in (k, v))
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            key, value = k[b, h // group].double(), v[b, h // group].double()
            for row in range(prompt.q_len):
                i, query = row // size, q[b, h, row].double() * scale
                weight, total = 0.0, torch.zeros(v.shape[3], dtype=torch.float64)
                for j in range(prompt.n_k):
                    block = reference.key_block(prompt, j)
                    if keep[b, h, i, j]:
                        seen = [t for t in block if tokens[b, row, t]]
                        e = (key[seen] @ query).exp()
                        weight, total = weight + e.sum(), total + e @ value[seen]
                    elif whole[b, 0, i, j]:
                        e = len(block) * math.exp(k_means[b, h // group, j] @ query)
                        weight, total = weight + e, total + e * v_means[b, h // group, j]
                out[b, h, row] = total / weight if weight else 0.0
    return out


CASES = {
    "odd length": {"q_len": 101},
    "whole blocks": {"q_len": 96},
    "chunk on the grid": {"q_len": 48, "kv_len": 144},
    "chunk off the grid": {"q_len": 41, "kv_len": 150},
    "left padding": {"q_len": 101, "padding": [37, 0]},
    "documents": {"q_len": 101, "documents": [0] * 40 + [1] * 61},
}


def case(q_len, kv_len=None, padding=None, documents=None, dtype=torch.float32):
    qkv = reference.random_qkv(2, 4, 2, q_len, kv_len, scale=4, dtype=dtype)
    return qkv, sp.Prompt(q_len, kv_len or q_len, 16, left_padding=padding, documents=documents)


@pytest.mark.parametrize("of", [A_SHAPE, POOLED], ids=["one table for all heads", "a table for each head"])
@pytest.mark.parametrize("situation", CASES)
def test_the_output_is_attention_over_kept_tokens_and_means_of_the_others(of, situation):
    (q, k, v), prompt = case(**CASES[situation])
    strategy = sp.get_strategy("mean_correction", of=of)
    keep = strategy.keep(q, k, prompt)
    assert torch.equal(keep, strategy.of.keep(q, k, prompt))
    out = strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep)
    torch.testing.assert_close(out.double(), corrected(q, k, v, keep, prompt), rtol=0, atol=1e-5)
    if (prompt.fully_visible() & ~keep).any():
        assert (out - reference.sparse_attention(q, k, v, keep, prompt)).abs().max() > 1e-2


def test_bf16_inputs_with_a_scale_from_the_caller():
    (q, k, v), prompt = case(101, dtype=torch.bfloat16)
    strategy = sp.get_strategy("mean_correction", of=A_SHAPE)
    out = sp.sparse_attention(q, k, v, strategy, scale=0.1)
    assert out.dtype == torch.bfloat16
    keep = strategy.keep(q, k)
    torch.testing.assert_close(out.double(), corrected(q, k, v, keep, prompt, 0.1), rtol=0, atol=2e-2)


@pytest.mark.parametrize("situation", CASES)
def test_if_the_keys_of_each_block_are_equal_the_output_is_dense_for_any_table(situation):
    (q, k, v), prompt = case(**CASES[situation])
    k = k[:, :, ::16].repeat_interleave(16, 2)[:, :, : prompt.kv_len].contiguous()
    table = torch.rand(2, 4, prompt.n_q, prompt.n_k) < 0.3
    keep = (table | ~prompt.fully_visible()) & prompt.visible()  # means can't replace partly visible blocks
    strategy = sp.get_strategy("mean_correction", of=A_SHAPE)
    out = strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep)
    torch.testing.assert_close(out.double(), reference.dense_attention(q, k, v, prompt), rtol=0, atol=1e-5)


@pytest.mark.parametrize("situation", CASES)
def test_if_the_table_keeps_all_blocks_the_output_is_dense(situation):
    (q, k, v), prompt = case(**CASES[situation])
    strategy = sp.get_strategy("mean_correction", of=A_SHAPE)
    out = strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), prompt.visible().expand(2, 4, -1, -1))
    torch.testing.assert_close(out.double(), reference.dense_attention(q, k, v, prompt), rtol=0, atol=1e-5)


def test_weights_sum_to_one():
    (q, k, v), prompt = case(101)
    strategy = sp.get_strategy("mean_correction", of=A_SHAPE)
    out = strategy.attend(sp.AttentionInputs(q=q, k=k, v=torch.ones_like(v), prompt=prompt), strategy.keep(q, k))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


def test_new_lengths_compile_no_new_graphs_with_or_without_segments():
    strategy = sp.get_strategy("mean_correction", of=POOLED)
    for q_len in (101, 96):
        (q, k, v), _ = case(q_len)
        sp.sparse_attention(q, k, v, strategy)
        sp.sparse_attention(q, k, v, strategy.of)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for q_len, kv_len in ((33, 33), (150, 150), (41, 205), (257, 257), (64, 320), (300, 301)):
        (q, k, v), _ = case(q_len, kv_len)
        sp.sparse_attention(q, k, v, strategy)
        sp.sparse_attention(q, k, v, strategy.of)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_wrapping_twice_is_refused():
    wrapped = sp.get_strategy("mean_correction", of="a_shape")
    with pytest.raises(ValueError, match="already has this correction"):
        sp.get_strategy("mean_correction", of=wrapped)
    with pytest.raises(ValueError, match="already has this correction"):
        sp.get_strategy("mean_correction", of={"name": "delta", "of": wrapped})


# Segments in general ----------------------------------------------------------------------------------------


def segment(prompt, slots, bias=0.0, heads=4, seed=0):
    _, k, v = reference.random_qkv(2, 4, 2, slots, seed=seed + 10)
    keep = torch.rand(2, heads, prompt.n_q, slots, generator=torch.Generator().manual_seed(seed)) < 0.4
    return Segment(k=k, v=v, keep=keep, bias=bias)


def test_several_segments_of_any_length_share_one_softmax():
    (q, k, v), prompt = case(101)
    keep = sp.get_strategy(**POOLED).keep(q, k)
    segments = [segment(prompt, 37, 0.7), segment(prompt, 16, -1.0, heads=1, seed=1)]
    segments[0].keep[..., :16] = True  # one whole block of the segment
    segments[1].keep[:, :, 3] = False
    out = sp.block_sparse_attention(q, k, v, keep, prompt=prompt, segments=segments)

    tokens = keep.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :101, :101] & reference.token_mask(prompt)
    tables = [s.keep.expand(2, 4, -1, -1).repeat_interleave(16, 2)[:, :, :101] for s in segments]
    keys, values = (torch.cat(x, 2).double() for x in ([k, *(s.k for s in segments)], [v, *(s.v for s in segments)]))
    bias = torch.cat([torch.zeros(101), torch.full((37,), 0.7), torch.full((16,), -1.0)]).double()
    logits = q.double() @ keys.repeat_interleave(2, 1).mT / 4 + bias
    p = logits.masked_fill(~torch.cat([tokens, *tables], -1), -math.inf).softmax(-1)
    torch.testing.assert_close(out.double(), p @ values.repeat_interleave(2, 1), rtol=0, atol=1e-5)


def test_segments_are_listed_after_the_keys_and_their_whole_kept_blocks_as_full():
    prompt = sp.Prompt(64, block_size=16)
    one = segment(prompt, 48)
    one.keep[:] = False
    one.keep[:, :, :, :16] = True
    one.keep[:, :, 2, 33] = True
    tables = block_tables(prompt.diagonal(), prompt, [one])
    assert tables.full_counts[0, 0].tolist() == [1, 1, 1, 1]
    assert (tables.full_indices[..., 0] == 4).all()  # after four blocks of keys
    assert tables.partial_counts[0, 0].tolist() == [1, 1, 2, 1]
    assert tables.partial_indices[0, 0, 2, :2].tolist() == [2, 6]


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("k", torch.zeros(2, 2, 5, 8), "keys of a segment must be"),
        ("v", torch.zeros(2, 2, 6, 16), "values of a segment must be"),
        ("v", torch.zeros(2, 2, 5, 16, dtype=torch.float16), "values of a segment must be"),
        ("keep", torch.ones(2, 4, 7, 6, dtype=torch.bool), "table of a segment must be"),
        ("keep", torch.ones(2, 2, 7, 5, dtype=torch.bool), "table of a segment must be"),
        ("keep", torch.ones(2, 4, 7, 5), "table of a segment must be"),
    ],
)
def test_segments_that_do_not_fit_are_refused(part, value, message):
    (q, k, v), prompt = case(101)
    one = {"k": k[:, :, :5], "v": v[:, :, :5], "keep": torch.ones(2, 4, 7, 5, dtype=torch.bool), part: value}
    with pytest.raises(ValueError, match=message):
        sp.block_sparse_attention(q, k, v, prompt.visible(), prompt=prompt, segments=[Segment(**one)])


def test_the_kernel_with_modifiers_is_not_run_without_segments(monkeypatch):
    monkeypatch.setattr(flex, "compiled_with_modifiers", None)
    (q, k, v), _ = case(101)
    sp.sparse_attention(q, k, v, sp.get_strategy(**A_SHAPE))
    with pytest.raises(TypeError):
        sp.sparse_attention(q, k, v, sp.get_strategy("mean_correction", of=A_SHAPE))

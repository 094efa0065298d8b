"""A few queries after a cached prefix count as decoding: dense and exact with any strategy."""

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill.wrappers.base import Wrapper

PREFIX = 400


def strategy(**options):
    return sp.get_strategy("a_shape", sink=64, local=64, block_size=64, min_length=0, **options)


def attended(queries, of, prompt):
    q, k, v = reference.random_qkv(1, 4, 2, queries, PREFIX + queries, dim=64)
    with sp.record() as calls:
        out = sp.sparse_attention(q, k, v, of, prompt=prompt)
    return out, reference.dense_attention(q, k, v, prompt), calls


@pytest.mark.parametrize("queries", [1, 2, 16, 32])
def test_a_few_queries_after_a_prefix_are_exact(queries):
    out, dense, calls = attended(queries, strategy(), sp.Prompt(queries, PREFIX + queries, 64))
    torch.testing.assert_close(out.double(), dense, rtol=0, atol=1e-5)
    assert [call.dense for call in calls] == ["decode"]


@pytest.mark.parametrize(
    ("queries", "options", "total_len"),
    [(33, {}, None), (16, {"max_decode_queries": 0}, None), (16, {"max_decode_queries": 15}, None), (16, {}, 600)],
)
def test_chunks_of_a_prefill_stay_sparse(queries, options, total_len):
    prompt = sp.Prompt(queries, PREFIX + queries, 64, total_len=total_len)
    out, dense, calls = attended(queries, strategy(**options), prompt)
    assert (out - dense).abs().max() > 1e-3
    assert calls[0].dense is None
    assert calls[0].density.mean() < 0.6


def test_a_short_prompt_without_a_prefix_does_not_count_as_decoding():
    assert strategy().dense_reason(sp.Prompt(20, block_size=16)) is None


def test_wrappers_have_the_decoding_rule_of_the_wrapped_strategy():
    wrapped = sp.get_strategy("delta", of=strategy(max_decode_queries=7))
    assert wrapped.max_decode_queries == 7
    assert wrapped.dense_reason(sp.Prompt(7, 400, 64)) == "decode"
    assert wrapped.dense_reason(sp.Prompt(8, 400, 64)) is None


def test_options_of_the_decoding_rule_are_checked():
    with pytest.raises(ValueError, match="max_decode_queries must be a whole number"):
        strategy(max_decode_queries=-1)


class Doubled(Wrapper):
    def attend(self, inputs, keep, segments=()):
        return 2 * super().attend(inputs, keep, segments)


@pytest.mark.parametrize(
    ("q_len", "of"),
    [(512, "dense"), (512, sp.get_strategy("a_shape", min_length=1024)), (1, strategy()), (16, strategy())],
)
def test_wrappers_that_change_the_output_also_change_dense_calls(q_len, of):
    q, k, v = reference.random_qkv(1, 4, 2, q_len, 512, dim=64)
    prompt = sp.Prompt(q_len, 512, sp.get_strategy(of).block_size if isinstance(of, str) else of.block_size)
    with sp.record() as calls:
        out = sp.sparse_attention(q, k, v, Doubled(of=of), prompt=prompt)
    assert calls[0].dense
    torch.testing.assert_close(out.double(), 2 * reference.dense_attention(q, k, v, prompt), rtol=0, atol=2e-5)

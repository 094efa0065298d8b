"""The similarity guard adds only the rows and columns of dissimilar blocks to the table of any strategy."""

import math

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill.estimators import dissimilar_blocks

SITUATIONS = {
    "whole": {"q_len": 200},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 4, "left_padding": [37, 0]},
}
OF = [
    {"name": "mean_pool", "share": 0.3},
    {"name": "a_shape", "sink": 16, "local": 32},
    {"name": "flash_prefill", "alpha": 0.7, "sink": 0, "local": 0, "last": 20},
]


def inputs(left_padding=None, **sizes):
    q, k, v = reference.random_qkv(**sizes)
    for x in (q, k):  # the tokens of every third block are similar
        alike = torch.arange(x.shape[2]) // 16 % 3 == 0
        x[:, :, alike] += 2
    return (q, k, v), sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding)


def guard(of, threshold):
    return sp.get_strategy("similarity_guard", of={**of, "block_size": 16, "min_length": 0}, threshold=threshold)


@pytest.mark.parametrize("of", OF, ids=lambda of: of["name"])
@pytest.mark.parametrize("sizes", SITUATIONS.values(), ids=SITUATIONS)
def test_rows_and_columns_of_dissimilar_blocks_are_added_to_the_strategy_s_table(of, sizes):
    (q, k, _), prompt = inputs(**sizes)
    strategy = guard(of, 0.4)
    rows, columns = dissimilar_blocks(q, k, prompt, 0.4)
    real = reference.visible(prompt, len(q))
    assert (rows & real).any()
    assert (columns & ~rows & real).any()
    assert (~columns & ~rows & real).any()
    want = (strategy.of.keep(q, k, prompt) | rows | columns) & real
    assert torch.equal(strategy.keep(q, k, prompt), want)


@pytest.mark.parametrize("of", OF, ids=lambda of: of["name"])
def test_a_negative_threshold_adds_no_block_and_one_above_one_keeps_all(of):
    (q, k, _), prompt = inputs(q_len=200)
    unguarded = guard(of, 0.4).of.keep(q, k, prompt).expand(1, 6, -1, -1)
    assert torch.equal(guard(of, -0.1).keep(q, k, prompt), unguarded)
    assert torch.equal(guard(of, 1.01).keep(q, k, prompt), prompt.visible().expand(1, 6, -1, -1))


def test_chunks_of_whole_blocks_select_the_rows_of_the_whole_prompt():
    (q, k, _), prompt = inputs(q_len=200)
    strategy = guard(OF[0], 0.4)
    whole = strategy.keep(q, k, prompt)
    part = strategy.keep(q[:, :, 96:144], k[:, :, :144])
    assert torch.equal(part, whole[:, :, 6:9, :9])


def test_attention_is_over_the_kept_blocks():
    (q, k, v), prompt = inputs(q_len=200)
    strategy = guard(OF[0], 0.4)
    want = reference.sparse_attention(q, k, v, strategy.keep(q, k), prompt)
    torch.testing.assert_close(sp.sparse_attention(q, k, v, strategy).double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threshold", [math.nan, math.inf, "0.6", None, True])
def test_a_threshold_that_is_not_a_finite_number_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be a finite number"):
        guard(OF[0], threshold)

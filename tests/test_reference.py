"""The plain loops of the reference equal values computed by hand."""

import doctest
import math

import torch

import sparse_prefill as sp
from sparse_prefill import reference


def test_the_example_runs():
    assert doctest.testmod(reference).failed == 0


def test_the_token_mask_follows_causality_padding_documents_and_window():
    padded = sp.Prompt(3, block_size=16, left_padding=[1])
    assert reference.token_mask(padded)[0].int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    ended = sp.Prompt(3, block_size=16, right_padding=[1])
    assert reference.token_mask(ended)[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    packed = sp.Prompt(3, block_size=16, documents=[0, 1, 1])
    assert reference.token_mask(packed)[0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    chunk = sp.Prompt(2, 4, 16, window=2)
    assert reference.token_mask(chunk)[0].int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


def test_attention_weighs_values_by_the_softmax_of_scaled_products():
    q, k = torch.tensor([[[[2.0, 0.0, 0.0, 0.0]]]]), torch.tensor([[[[math.log(3), 0, 0, 0], [0.0, 0, 0, 0]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    out = reference.attention(q, k, v, torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(out, torch.tensor([[[[5.0]]]], dtype=torch.float64))  # 3/4 of 4 and 1/4 of 8


def test_a_query_without_keys_gets_zeros():
    q = torch.ones(1, 1, 1, 4)
    assert reference.attention(q, q, q, torch.zeros(1, 1, dtype=torch.bool)).tolist() == [[[[0.0] * 4]]]


def test_a_query_attends_only_to_kept_blocks():
    q, v = torch.zeros(1, 1, 32, 16), torch.arange(32.0).expand(1, 1, 1, 32).mT
    keep = torch.tensor([[[[True, False], [False, True]]]])
    out = reference.sparse_attention(q, q, v, keep, sp.Prompt(32, block_size=16))
    assert out[0, 0, 31, 0] == sum(range(16, 32)) / 16


def test_the_largest_and_the_fewest_entries():
    assert reference.largest([0.2, 0.5, 0.2], 2) == {0, 1}
    assert [reference.fewest([0.25, 0.5, 0.25], share) for share in (0.5, 0.6, 1)] == [1, 2, 3]

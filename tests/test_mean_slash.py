"""mean_slash equals its formulas in plain loops."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "a token behind whole blocks": {"q_len": 129},
    "300": {"q_len": 300, "heads": 4, "kv_heads": 1},
    "chunk": {"q_len": 48, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
}


def inputs(left_padding=None, scale=8.0, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding)


def shares(q, k, prompt):
    """What each query block is thought to give to each block: float64 [B, H, n_q, n_k], 0 of invisible ones."""
    vertical, slash, _ = reference.representative(q, k, prompt)
    pooled = reference.pooled_attention(q, k, prompt)
    seen = reference.visible(prompt, len(q))
    found = torch.zeros(pooled.shape, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, pooled.shape[:3])).tolist():
        in_sight = [j for j in range(prompt.n_k) if seen[b, 0, i, j]]
        first_block = reference.padding_of(prompt, b) // 16
        beside_of_last = 1.0
        for j in in_sight:
            first, last = (row // 16 for row in (prompt.offset + 16 * i, prompt.offset + 16 * i + 15))
            last = min(last, prompt.n_k - 1)
            of_last = [vertical[b, h, j], *(slash[b, h, block - j] for block in {first, last} if block >= j)]
            estimates = [float(pooled[b, h, i, j]), float(max(of_last))]
            if 16 * (i + 1) > prompt.q_len - 16:  # one of the last 16 queries is in this block
                estimates = [float(vertical[b, h, j])] * 2
            if j == first_block:
                beside_of_last = 1 - estimates[1]
            even = 0.01 / len(in_sight)
            found[b, h, i, j] = math.sqrt((estimates[0] + even) * (estimates[1] + even))
        if in_sight:
            found[b, h, i] /= found[b, h, i].sum()
            others = [j for j in in_sight if j != first_block]
            beside = float(found[b, h, i, others].sum())
            left = math.sqrt(beside * max(beside_of_last, 0.01))
            found[b, h, i, others] *= left / beside if beside else 0
            found[b, h, i, first_block] = 1 - left
    return found


@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
def test_scores_are_the_geometric_mean_of_both_estimates(sizes):
    q, k, prompt = inputs(**sizes)
    found = sp.get_strategy("mean_slash", block_size=16).score(q, k, prompt)
    torch.testing.assert_close(found.double(), shares(q, k, prompt), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
def test_blocks_that_reach_the_threshold_are_kept_with_the_first_and_own_ones(sizes, threshold):
    q, k, prompt = inputs(**sizes)
    keep = sp.get_strategy("mean_slash", block_size=16, threshold=threshold, sink=0).keep(q, k, prompt)
    scores, own = shares(q, k, prompt), reference.diagonal(prompt, len(q))
    sure = (scores - threshold).abs() > 1e-5  # rounding decides the others
    want = (scores >= threshold) | own
    assert torch.equal(keep & sure, want & sure)


@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), (48, 208)])
def test_by_default_a_block_must_be_given_half_of_an_even_share(q_len, kv_len):
    q, k, prompt = inputs(q_len=q_len, kv_len=kv_len)
    keep = sp.get_strategy("mean_slash", block_size=16).keep(q, k)
    half = sp.get_strategy("mean_slash", block_size=16, threshold=0.5 / prompt.n_k).keep(q, k)
    assert torch.equal(keep, half)
    assert keep.sum() < prompt.visible().expand_as(keep).sum()


def test_the_inputs_of_this_file_leave_something_to_skip():
    q, k, prompt = inputs(q_len=300)
    keep = sp.get_strategy("mean_slash", threshold=0.02, block_size=16).keep(q, k)
    assert (prompt.visible() & ~keep).any((2, 3)).all()


@given(seed=st.integers(0, 100), scale=st.sampled_from([0.0, 1.0, 8.0, 1000.0]))
def test_a_lower_threshold_keeps_more_and_0_everything(seed, scale):
    q, k, prompt = inputs(q_len=150, seed=seed, scale=scale)
    keeps = [
        sp.get_strategy("mean_slash", block_size=16, threshold=threshold).keep(q, k) for threshold in (0, 0.01, 0.1, 1)
    ]
    for more, less in pairwise(keeps):
        assert not (less & ~more).any()
    assert torch.equal(keeps[0], prompt.visible().expand_as(keeps[0]))


def test_a_block_that_the_last_queries_ignore_is_kept_where_means_find_it():
    q, k = torch.zeros(1, 1, 320, 16), torch.zeros(1, 1, 320, 16)
    k[:, :, 80:96, 0] = 4  # block 5
    q[:, :, 160:176, 0] = 40  # block 10 looks at it
    k[:, :, 0, 1] = 400  # the last queries at the first token alone
    q[:, :, -16:, 1] = 40
    vertical, *_ = reference.representative(q, k, sp.Prompt(320, block_size=16))
    assert vertical[0, 0, 5] < 1e-30
    keep = sp.get_strategy("mean_slash", block_size=16).keep(q, k)
    assert keep[0, 0, 10, 5]


def test_padding_has_no_say():
    q, k, prompt = inputs(**PROMPTS["padding"])
    strategy = sp.get_strategy("mean_slash", block_size=16, threshold=0.05)
    keep = strategy.keep(q, k, prompt)
    changed = k.clone()
    changed[0, :, :37] = 1e3
    assert torch.equal(strategy.keep(q, changed, prompt), keep)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, "0.9", True, math.nan])
def test_a_threshold_out_of_range_is_refused(threshold):
    for make in (sp.get_strategy, sp.get_selector):
        with pytest.raises(ValueError, match="threshold must be"):
            make("mean_slash" if make is sp.get_strategy else "threshold", threshold=threshold)


def test_several_documents_are_refused():
    q, k, _ = inputs(q_len=100)
    prompt = sp.Prompt(100, block_size=16, documents=torch.tensor([[0] * 50 + [1] * 50]))
    with pytest.raises(ValueError, match="would all lie in the last one"):
        sp.get_strategy("mean_slash", block_size=16).keep(q, k, prompt)

"""mean_slash equals its formulas in plain loops."""

from __future__ import annotations

import math
from importlib import import_module
from itertools import pairwise

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.strategies.mean_slash import _weights

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "a token after whole blocks": {"q_len": 129},
    "300": {"q_len": 300, "heads": 4, "kv_heads": 1},
    "chunk": {"q_len": 48, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "window": {"q_len": 300, "window": 60},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
}


def inputs(left_padding=None, window=None, scale=8.0, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding, window=window)


def parts(pooled, vertical, slash, prompt, seen, i):
    """Six estimates of the attention of query block i to each block: lists that sum to 1 over the visible blocks."""
    visible = [bool(x) for x in seen[i]]
    rows = {(prompt.offset + 16 * i) // 16, min((prompt.offset + 16 * i + 15) // 16, prompt.n_k - 1)}
    diagonal = [max((float(slash[row - j]) for row in rows if row >= j), default=0.0) for j in range(prompt.n_k)]
    pooled, vertical = pooled[i].tolist(), vertical.tolist()
    both = [[math.sqrt(a * b) for a, b in zip(pooled, x, strict=True)] for x in (vertical, diagonal)]
    found = []
    for values in (pooled, vertical, diagonal, *both, [1.0] * prompt.n_k):
        values = [x if is_visible else 0.0 for x, is_visible in zip(values, visible, strict=True)]
        found.append([x / sum(values) if sum(values) else 0.0 for x in values])
    return found


def spread(prompt):
    """The query blocks that the weights are fitted to, with the rows of each."""
    count = min(16, prompt.n_q)
    for i in range(1, count + 1):
        block = i * prompt.n_q // (count + 1)
        yield block, [min(16 * block + within, prompt.q_len - 1) for within in (4, 12)]


def fitted(rows):
    """Weights of six parts after ten steps of expectation maximisation; ``rows`` pairs estimates with true masses."""
    weights = [1 / 6] * 6
    for _ in range(10):
        responsibilities = [1e-4] * 6
        for estimates, truth in rows:
            for j, mass in enumerate(truth):
                mixed = sum(weight * estimate[j] for weight, estimate in zip(weights, estimates, strict=True))
                for part, estimate in enumerate(estimates):
                    responsibilities[part] += mass * weights[part] * estimate[j] / mixed if mass else 0.0
        weights = [x / sum(responsibilities) for x in responsibilities]
    return weights


def shares(q, k, prompt):
    """The estimated attention of each query block to each block: float64 [B, H, n_q, n_k], 0 for invisible blocks."""
    vertical, slash, *_ = reference.representative(q, k, prompt, stride=2)
    pooled = reference.pooled_attention(q, k, prompt)
    p = reference.probabilities(q, k, reference.token_mask(prompt, len(q))[:, None])
    seen = reference.visible(prompt, len(q))[:, 0]
    found = torch.zeros(pooled.shape, dtype=torch.float64)
    for b, h in torch.cartesian_prod(*map(torch.arange, pooled.shape[:2])).tolist():

        def estimates(i, b=b, h=h):
            return parts(pooled[b, h], vertical[b, h], slash[b, h], prompt, seen[b], i)

        known = []
        for block, rows in spread(prompt):
            keys = [reference.key_block(prompt, j) for j in range(prompt.n_k)]
            truth = [float(p[b, h, rows][:, x.start : x.stop].sum()) / 2 for x in keys]
            known.append((estimates(block), truth))
        weights = fitted(known)
        for i in range(prompt.n_q):
            rows = zip(*estimates(i), strict=True)
            found[b, h, i] = torch.tensor([sum(w * x for w, x in zip(weights, row, strict=True)) for row in rows])
            if 16 * (i + 1) > prompt.q_len - 16:  # one of the last 16 queries is in this block
                found[b, h, i] = torch.where(seen[b, i], vertical[b, h], 0)
            found[b, h, i] /= found[b, h, i].sum().clamp(min=1e-300)
    return found


@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
def test_scores_are_the_maximum_likelihood_mixture_of_the_estimates(sizes):
    q, k, prompt = inputs(**sizes)
    found = sp.get_strategy("mean_slash", block_size=16).score(q, k, prompt).shares
    torch.testing.assert_close(found.double(), shares(q, k, prompt), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
def test_rounded_logits_change_scores_only_a_little(sizes, monkeypatch):
    """Even if all logits of a query are high, including the queries that the weights are fitted to."""
    monkeypatch.setattr(import_module("sparse_prefill.estimators.attention_mass"), "kernel_dtype", lambda x: x.dtype)
    q, k, prompt = inputs(**{**sizes, "scale": 4.0})
    q, k = (q.abs() + 4).bfloat16(), (k + 64).bfloat16()
    strategy = sp.get_strategy("mean_slash", block_size=16)
    low, high = strategy.score(q, k, prompt).shares, strategy.score(q.float(), k.float(), prompt).shares
    assert (low - high).abs().sum(-1).max() < 0.05


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
def test_blocks_that_reach_the_threshold_and_the_first_and_own_blocks_are_kept(sizes, threshold):
    q, k, prompt = inputs(**sizes)
    keep = sp.get_strategy("mean_slash", block_size=16, threshold=threshold, sink=0).keep(q, k, prompt)
    scores, own = shares(q, k, prompt), reference.diagonal(prompt, len(q))
    *_, peak = reference.representative(q, k, prompt, stride=2)
    single_query = torch.zeros_like(scores)  # the peak over the last 16 queries, in their blocks
    last = slice(max(0, prompt.q_len - 16) // 16, None)
    single_query[:, :, last] = torch.where(reference.visible(prompt, len(q))[:, :, last], peak[:, :, None], 0)
    sure = ((scores - threshold).abs() > 1e-5) & ((single_query - 0.05).abs() > 1e-5)  # rounding decides the others
    want = (scores >= threshold) | (single_query >= 0.05) | own
    assert torch.equal(keep & sure, want & sure)


@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), (48, 208)])
def test_the_default_threshold_is_half_of_an_even_share(q_len, kv_len):
    q, k, prompt = inputs(q_len=q_len, kv_len=kv_len)
    keep = sp.get_strategy("mean_slash", block_size=16).keep(q, k)
    half = sp.get_strategy("mean_slash", block_size=16, threshold=0.5 / prompt.n_k).keep(q, k)
    assert torch.equal(keep, half)
    assert keep.sum() < prompt.visible().expand_as(keep).sum()


def test_the_inputs_of_this_file_skip_blocks():
    q, k, prompt = inputs(q_len=300)
    keep = sp.get_strategy("mean_slash", threshold=0.02, block_size=16).keep(q, k)
    assert (prompt.visible() & ~keep).any((2, 3)).all()


@given(seed=st.integers(0, 100), scale=st.sampled_from([0.0, 1.0, 8.0, 1000.0]))
def test_a_lower_threshold_keeps_a_superset_and_zero_keeps_all_blocks(seed, scale):
    q, k, prompt = inputs(q_len=150, seed=seed, scale=scale)
    keeps = [
        sp.get_strategy("mean_slash", block_size=16, threshold=threshold).keep(q, k) for threshold in (0, 0.01, 0.1, 1)
    ]
    for more, less in pairwise(keeps):
        assert not (less & ~more).any()
    assert torch.equal(keeps[0], prompt.visible().expand_as(keeps[0]))


def test_a_block_that_the_last_queries_ignore_is_kept_if_pooled_attention_finds_it():
    q, k = torch.zeros(1, 1, 320, 16), torch.zeros(1, 1, 320, 16)
    k[:, :, 80:96, 0] = 4  # block 5
    q[:, :, 160:176, 0] = 40  # block 10 attends to it
    k[:, :, 0, 1] = 400  # the last queries attend only to the first token
    q[:, :, -16:, 1] = 40
    vertical, *_ = reference.representative(q, k, sp.Prompt(320, block_size=16), stride=2)
    assert vertical[0, 0, 5] < 1e-30
    keep = sp.get_strategy("mean_slash", block_size=16).keep(q, k)
    assert keep[0, 0, 10, 5]


@pytest.mark.parametrize(("key", "share", "kept"), [(3.12, 0.099, True), (2.6, 0.03, False)])
def test_a_block_that_one_of_the_last_queries_attends_to_is_kept_for_their_rows(key, share, kept):
    q, k = torch.zeros(1, 1, 320, 16), torch.zeros(1, 1, 320, 16)
    q[:, :, -16:-1, 1] = 40  # all the other last queries attend only to the first token
    k[:, :, 0, 1] = 400
    q[:, :, -1, 0] = 10
    k[:, :, 0, 0] = 4
    k[:, :, 85, 0] = key
    vertical, _, _, peak = reference.representative(q, k, sp.Prompt(320, block_size=16), stride=2)
    assert float(peak[0, 0, 5]) == pytest.approx(share, abs=1e-3)
    assert vertical[0, 0, 5] < 0.5 / 20  # below the threshold in the mean
    keep = sp.get_strategy("mean_slash", block_size=16).keep(q, k)[0, 0, -1]
    assert keep.nonzero().flatten().tolist() == ([0, 5, 19] if kept else [0, 19])


def one_hot(dims, dim, height):
    """[1, 1, len(dims), dim]: ``height`` at the dimension of each token, or all 0 where that is negative."""
    found = torch.zeros(1, 1, len(dims), dim)
    for token, position in enumerate(dims):
        if position >= 0:
            found[0, 0, token, position] = height
    return found


def test_a_head_that_attends_to_fixed_tokens_keeps_no_diagonals():
    marked = {3, 70, 75, 160}
    k = one_hot([0 if token in marked else -1 for token in range(480)], 16, 10)
    q = one_hot([0] * 480, 16, 10)
    keep = sp.get_strategy("mean_slash", block_size=16).keep(q, k)[0, 0]
    for i in range(20, 30):
        assert keep[i].nonzero().flatten().tolist() == [0, 4, 10, i]


def test_a_head_that_attends_at_a_fixed_distance_keeps_no_columns():
    q = one_hot([max(token // 16 - 7, 0) for token in range(480)], 32, 10)
    k = one_hot([token // 16 if token % 16 == 5 else -1 for token in range(480)], 32, 10)  # means hardly change
    keep = sp.get_strategy("mean_slash", block_size=16).keep(q, k)[0, 0]
    for i in range(8, 30):
        assert keep[i].nonzero().flatten().tolist() == [0, i - 7, i]


@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
def test_the_scores_of_each_query_block_sum_to_one(sizes):
    q, k, prompt = inputs(**sizes)
    scores = sp.get_strategy("mean_slash", block_size=16).score(q, k, prompt).shares
    seen = prompt.visible().expand_as(scores)
    assert not scores[~seen].any()
    torch.testing.assert_close(scores.sum(-1), seen.any(-1).float())


def test_scores_do_not_depend_on_the_number_of_rows_per_step(monkeypatch):
    q, k, prompt = inputs(q_len=300)
    strategy = sp.get_strategy("mean_slash", block_size=16)
    whole = strategy.score(q, k, prompt).shares
    monkeypatch.setattr("sparse_prefill.strategies.mean_slash.ENTRIES", 6 * prompt.n_k * 5)
    torch.testing.assert_close(strategy.score(q, k, prompt).shares, whole)


@pytest.mark.parametrize(("tokens", "block_size", "pool_size"), [(300, 64, 16), (17000, 64, 32), (17000, 16, 16)])
def test_the_default_pool_size_is_the_smallest_that_gives_at_most_1024_means(tokens, block_size, pool_size):
    q, k, _ = reference.random_qkv(q_len=tokens, heads=1, kv_heads=1)
    default, by_size = (sp.get_strategy("mean_slash", block_size=block_size, pool_size=g) for g in (None, pool_size))
    prompt = sp.Prompt(tokens, block_size=block_size)
    scores = default.score(q, k, prompt).shares
    assert torch.equal(scores, by_size.score(q, k, prompt).shares)
    if pool_size < block_size:
        coarse = sp.get_strategy("mean_slash", block_size=block_size, pool_size=block_size)
        assert not torch.equal(scores, coarse.score(q, k, prompt).shares)


def test_finer_means_find_blocks_that_only_a_few_tokens_attend_to():
    """In each of six blocks half of the queries attend to 16 keys that the last queries ignore."""
    q, k = 0.1 * torch.randn(2, 1, 1, 2048, 16, generator=torch.Generator().manual_seed(0))
    for block in range(9, 15):
        q[0, 0, 128 * block : 128 * block + 128, block] = 24
        q[0, 0, 128 * block + 64 : 128 * block + 128, block] = -24  # the queries of the block have mean zero
        k[0, 0, 128 * (block - 3) + 16 : 128 * (block - 3) + 32, block] = 4
    keep = {g: sp.get_strategy("mean_slash", pool_size=g, threshold=0.16).keep(q, k)[0, 0] for g in (16, 128)}
    attended = torch.tensor([[block, block - 3] for block in range(9, 15)]).T
    assert keep[16][tuple(attended)].all()
    assert not keep[128][tuple(attended)].any()


@pytest.mark.parametrize("pool_size", [8, 17, "16"])
def test_a_pool_size_out_of_range_is_refused(pool_size):
    with pytest.raises(ValueError, match="pool_size must be a power of two"):
        sp.get_strategy("mean_slash", pool_size=pool_size)
    q, k, _ = inputs(q_len=100)
    with pytest.raises(ValueError, match="pool_size must be at most the block size"):
        sp.get_strategy("mean_slash", pool_size=128, block_size=64).keep(q, k)


def test_without_rows_to_fit_all_weights_are_equal():
    parts = torch.rand(1, 1, 2, 3), torch.rand(1, 1, 1, 3), torch.rand(1, 1, 2, 3), torch.ones(1, 1, 2, 3).bool()
    torch.testing.assert_close(_weights(*parts, torch.zeros(1, 1, 2, 3)), torch.full((6, 1, 1, 1, 1), 1 / 6))


def test_the_values_of_padding_do_not_change_the_table():
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

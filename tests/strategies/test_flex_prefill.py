"""FlexPrefill equals a version in plain loops, and has the properties that its docstring states."""

import itertools
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.strategies import flex_prefill


def flex(size=16, **options):
    return sp.get_strategy("flex_prefill", block_size=size, min_length=0, **options)


def columns_and_diagonals(keep):
    """The key blocks and the diagonals that every row keeps, in a keep table [n, n] of a whole prompt."""
    n = keep.shape[-1]
    return (
        {j for j in range(n) if keep[j:, j].all()},
        {o for o in range(n) if keep.diagonal(-o).all()},
    )


# Against plain loops --------------------------------------------------------------------------------------

OPTIONS = {
    "published": {"gamma": 0.9, "tau": 0.1, "min_budget": 1},
    "low gamma, no query-aware heads": {"gamma": 0.6, "tau": 0, "min_budget": 1},
    "all heads query-aware": {"gamma": 0.7, "tau": 1.0, "min_budget": 1},
    "some heads query-aware": {"gamma": 0.8, "tau": 0.25, "min_budget": 20},
    "budgets": {"gamma": 0.9, "tau": 0.1, "min_budget": 40, "max_budget": 100},
    "a budget that binds": {"gamma": 0.95, "tau": 0.25, "min_budget": 1, "max_budget": 30},
}
PROMPTS = {
    "odd length": {"q_len": 333},
    "whole blocks": {"q_len": 256, "heads": 4, "kv_heads": 1},
    "batch": {"q_len": 100, "batch": 2, "heads": 4, "kv_heads": 4},
    "more blocks than head_dim": {"q_len": 600, "heads": 2, "kv_heads": 1},
    "one block and a token": {"q_len": 17},
    "chunk": {"q_len": 64, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "chunk under a block": {"q_len": 5, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "padding": [37, 0]},
}


def inputs(padding=None, scale=4.0, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    # Heads with spread and with peaked attention, so that tau divides them.
    q = q * torch.linspace(0.1, 2, q.shape[1])[:, None, None]
    return q, k, sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=padding)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
def test_equals_plain_loops(sizes, options):
    q, k, prompt = inputs(**sizes)
    want, _ = reference.flex_prefill(q, k, prompt, **options)
    keep = flex(**options).keep(q, k, prompt)
    assert torch.equal(keep.expand_as(want), want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sizes", [sizes for sizes in PROMPTS.values() if not sizes.keys() & {"kv_len", "padding"}])
def test_official_selection_equals_the_published_steps_in_plain_loops(sizes, options):
    q, k, _ = inputs(**sizes)
    want, _ = reference.flex_prefill_official(q, k, 16, **options)
    keep = flex(official=True, **options).keep(q, k)
    assert torch.equal(keep.expand_as(want), want)


def test_some_but_not_all_heads_of_these_inputs_are_query_aware():
    q, k, prompt = inputs(q_len=333)
    for _, query_aware in (
        reference.flex_prefill(q, k, prompt, **OPTIONS["some heads query-aware"]),
        reference.flex_prefill_official(q, k, 16, **OPTIONS["some heads query-aware"]),
    ):
        assert 0 < query_aware.sum() < query_aware.numel()


@given(
    tokens=st.sampled_from([40, 63, 129, 200]),
    size=st.sampled_from([16, 32]),
    gamma=st.floats(0.3, 0.99),
    tau=st.sampled_from([0.0, 0.2, 0.4]),
    seed=st.integers(0, 9),
)
def test_equals_plain_loops_for_any_options(tokens, size, gamma, tau, seed):
    q, k, _ = reference.random_qkv(heads=4, kv_heads=2, q_len=tokens, seed=seed, scale=3)
    options = {"gamma": gamma, "tau": tau, "min_budget": 1}
    want, _ = reference.flex_prefill(q, k, sp.Prompt(q_len=tokens, block_size=size), **options)
    assert torch.equal(flex(size, **options).keep(q, k).expand_as(want), want)
    want, _ = reference.flex_prefill_official(q, k, size, **options)
    assert torch.equal(flex(size, official=True, **options).keep(q, k).expand_as(want), want)


# Properties -----------------------------------------------------------------------------------------------


@given(
    tokens=st.sampled_from([40, 63, 100, 129, 200, 333]),
    size=st.sampled_from([16, 32, 64]),
    scale=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
    gamma=st.sampled_from([0.5, 0.9, 0.99]),
    seed=st.integers(0, 9),
)
def test_vertical_slash_heads_keep_a_share_gamma_of_the_last_queries_attention(tokens, size, scale, gamma, seed):
    q, k, _ = reference.random_qkv(heads=4, kv_heads=2, q_len=tokens, seed=seed, scale=scale)
    keep = flex(size, gamma=gamma, tau=0).keep(q, k)
    prompt = sp.Prompt(q_len=tokens, block_size=size)
    last = min(size, tokens)
    kept = keep.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :tokens, :tokens][:, :, -last:]
    p = reference.probabilities(q, k, reference.token_mask(prompt)[:, None])[:, :, -last:]
    assert ((p * kept).sum(-1).mean(-1) >= gamma - 1e-6).all()


@pytest.mark.parametrize("official", [False, True])
def test_the_default_covers_mass_spread_over_many_blocks_and_the_released_code_does_not(official):
    # Ten keys in ten different blocks share the attention: tokens / 128 would give a single block.
    q, k = torch.zeros(1, 1, 320, 16), torch.zeros(1, 1, 320, 16)
    q[..., 0] = 20
    k[:, :, 8:320:32, 0] = 4
    strategy = flex(gamma=0.9, tau=0, min_budget=1, official=official)
    keep = strategy.keep(q, k)[0, 0]
    mass = reference.block_mass(q, k, sp.Prompt(q_len=320, block_size=16))[0, 0, -1]
    assert (mass[keep[-1]].sum() >= 0.9) == (not official)


def test_a_larger_gamma_keeps_a_superset():
    q, k, _ = inputs(q_len=333)
    for tau in (0.0, 1.0):
        keeps = [flex(gamma=gamma, tau=tau).keep(q, k) for gamma in (0.3, 0.6, 0.9, 0.97, 1.0)]
        for fewer, more in itertools.pairwise(keeps):
            assert (more | ~fewer).all()
        assert keeps[0].sum() < keeps[-1].sum()


@pytest.mark.parametrize("tau", [0, 0.25, 1.0])
def test_gamma_of_one_keeps_all_visible_blocks(tau):
    q, k, prompt = inputs(q_len=333)
    assert torch.equal(flex(gamma=1.0, tau=tau).keep(q, k), prompt.visible().expand(1, 6, -1, -1))


def test_a_tau_of_zero_makes_no_head_query_aware():
    q, k, _ = inputs(q_len=333, scale=0.01)  # means predict the attention of every head nearly exactly
    keep = flex(tau=0).keep(q, k)
    for h in range(6):
        columns, diagonals = columns_and_diagonals(keep[0, h])
        table = torch.tensor([[j <= i and (j in columns or i - j in diagonals) for j in range(21)] for i in range(21)])
        assert torch.equal(keep[0, h], table), "only columns and diagonals"


def test_a_tau_above_every_distance_makes_all_heads_query_aware():
    q, k, prompt = inputs(q_len=333)
    keep = flex(tau=0.84, min_budget=1, gamma=0.7).keep(q, k)  # the distance is at most sqrt(ln 2) = 0.8326
    mass = reference.pooled_attention(q, k, prompt)
    for h in range(6):
        flat = mass[0, h].flatten().tolist()
        for cell in reference.largest(flat, reference.fewest(flat, 0.7)):
            assert keep[0, h].flatten()[cell]
    assert ((mass * keep).sum((-2, -1)) >= 0.7 * prompt.n_q).all()


@pytest.mark.parametrize("official", [False, True])
def test_budgets_bound_the_columns_and_the_diagonals(official):
    q, k, _ = inputs(q_len=333)
    least = flex(gamma=0.01, tau=0, min_budget=65, official=official).keep(q, k)  # five blocks
    most = flex(gamma=0.99, tau=0, max_budget=48, official=official).keep(q, k)  # three
    for h in range(6):
        columns, diagonals = columns_and_diagonals(least[0, h])
        assert len(columns) >= 5
        assert len(diagonals) >= 5
        # The last row: three columns, three diagonals, the sink and the diagonal.
        assert most[0, h, -1].sum() <= 3 + 3 + 2


def test_the_maximum_budget_takes_precedence_over_the_minimum():
    q, k, _ = inputs(q_len=333)
    both = flex(tau=0, min_budget=160, max_budget=32).keep(q, k)
    assert torch.equal(both, flex(tau=0, min_budget=1, max_budget=32, gamma=0.999).keep(q, k))


@pytest.mark.parametrize(("tokens", "blocks"), [(333, 2), (100, 1), (16384, 4)])
def test_the_default_minimum_is_512_tokens_or_a_sixteenth_of_the_prompt(tokens, blocks):
    size = 128 if tokens == 16384 else 16
    q, k, _ = reference.random_qkv(heads=1, kv_heads=1, q_len=tokens, scale=3)
    keep = flex(size, gamma=0.001, tau=0).keep(q, k)
    assert torch.equal(keep, flex(size, gamma=0.001, tau=0, min_budget=blocks * size).keep(q, k))
    assert not torch.equal(keep, flex(size, gamma=0.001, tau=0, min_budget=(blocks + 1) * size).keep(q, k))


@pytest.mark.parametrize("official", [False, True])
def test_a_planted_column_is_kept_by_every_row(official):
    q, k, _ = reference.random_qkv(heads=2, kv_heads=1, q_len=333, scale=0.1)
    q[..., 0], k[..., 0] = 6, 0
    k[:, :, 150, 0] = 20  # every query attends to this key of block 9
    # The released code counts the sink as part of the budget, so a budget of one block would hold only the sink.
    keep = flex(tau=0, min_budget=32, official=official).keep(q, k)
    assert keep[:, :, 9:, 9].all()
    assert keep.sum() < 0.5 * 2 * 21 * 22 / 2, "few other blocks are kept"


def test_a_planted_diagonal_is_kept_in_every_row():
    # The query at t matches only the key at t - 80, five blocks before.
    tokens, size, back = 336, 16, 80
    turn = 2 * math.pi * torch.arange(tokens)[:, None] * torch.tensor([1 / 7, 1 / 11, 1 / 13, 1 / 97])
    k = torch.cat([turn.cos(), turn.sin()], -1)
    turn = turn - 2 * math.pi * back * torch.tensor([1 / 7, 1 / 11, 1 / 13, 1 / 97])
    q = 20 * torch.cat([turn.cos(), turn.sin()], -1)
    keep = flex(size, tau=0, min_budget=1).keep(q[None, None], k[None, None])[0, 0]
    _, diagonals = columns_and_diagonals(keep)
    assert {0, back // size} <= diagonals
    assert keep.sum() < 0.6 * 21 * 22 / 2


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_blocks_without_mass_give_no_nan(tau, official):
    q, k, v = reference.random_qkv(q_len=333, scale=200)  # softmax underflows to 0 in most blocks
    strategy = flex(tau=tau, official=official)
    keep = strategy.keep(q, k)
    assert keep.diagonal(dim1=-2, dim2=-1).all()
    assert sp.sparse_attention(q, k, v, strategy).isfinite().all()


def test_a_head_stays_query_aware_despite_underflow():
    # All attention is on one block, and the block means predict it: the distance is 0 despite the empty blocks.
    q, k = torch.zeros(1, 1, 320, 16), torch.zeros(1, 1, 320, 16)
    q[..., 0] = 100
    k[:, :, 160:176, 0] = 100
    options = {"gamma": 0.9, "tau": 0.1, "min_budget": 1}
    want, query_aware = reference.flex_prefill(q, k, sp.Prompt(q_len=320, block_size=16), **options)
    assert query_aware.all()
    assert torch.equal(flex(**options).keep(q, k), want)


def test_the_number_of_blocks_depends_on_the_block_size():
    # At twice the block size the same attention takes half as many blocks; tokens / 128 would give a quarter.
    q, k, _ = reference.random_qkv(heads=1, kv_heads=1, q_len=512, scale=0.1)
    fine = flex(16, gamma=0.5, tau=0, min_budget=1).keep(q, k)[0, 0]
    coarse = flex(32, gamma=0.5, tau=0, min_budget=1).keep(q, k)[0, 0]
    for keep, size in ((fine, 16), (coarse, 32)):
        columns, _ = columns_and_diagonals(keep)
        assert 0.4 * 512 <= len(columns) * size <= 0.7 * 512


@pytest.mark.parametrize("sizes", [PROMPTS["chunk"], PROMPTS["padding"]], ids=["chunk", "padding"])
def test_official_selection_refuses_prompts_that_the_released_code_does_not_support(sizes):
    q, k, prompt = inputs(**sizes)
    with pytest.raises(ValueError, match="drop official=True for chunks, prefixes and padding"):
        flex(official=True).keep(q, k, prompt)


def test_official_selection_of_a_short_prompt_is_dense():
    q, k, _ = inputs(q_len=100)
    assert torch.equal(
        flex(official=True, min_budget=100).keep(q, k), sp.Prompt(q_len=100, block_size=16).visible().expand(1, 1, 7, 7)
    )


@pytest.mark.parametrize("heads_at_once", [1, 2, 3])  # of six heads, three for each key head
def test_maps_of_query_aware_heads_do_not_depend_on_how_many_are_sorted_at_once(heads_at_once, monkeypatch):
    q, k, _ = reference.random_qkv(1, 6, 2, 333, scale=4)
    strategy = flex(tau=0.83, gamma=0.5)
    whole = strategy.keep(q, k)
    monkeypatch.setattr(flex_prefill, "MAX_PAIRS_SORTED", heads_at_once * 21 * 21)
    assert torch.equal(strategy.keep(q, k), whole)

"""Selectors keep the right number of blocks, and among equal scores the earlier blocks."""

import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.selectors import top_k
from sparse_prefill.selectors.binned import reaching_by_bins
from sparse_prefill.selectors.cumulative import MIN_BINNED_ENTRIES, cumulative
from sparse_prefill.selectors.cutoff import reaching

WHOLE = sp.Prompt(q_len=160, block_size=16)


def scores(prompt=WHOLE, heads=3, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.rand(prompt.batch, heads, prompt.n_q, prompt.n_k, generator=source)


def row(*values):
    """Scores in which the last query block of a prompt has these values."""
    prompt = sp.Prompt(q_len=16 * len(values), block_size=16)
    table = torch.zeros(1, 1, len(values), len(values))
    table[..., -1, :] = torch.tensor(values)
    return table, prompt


def last_row(selector, *values):
    return selector(*row(*values))[0, 0, -1].nonzero()[:, 0].tolist()


# top_k --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 10, 99])
def test_top_k_keeps_the_k_highest_visible_blocks(k):
    mass, seen = scores(), WHOLE.visible()
    kept = sp.get_selector("top_k", k=k)(mass, WHOLE) & seen
    for h in range(3):
        for i in range(10):
            best = reference.largest(mass[0, h, i, : i + 1].tolist(), k)
            assert set(kept[0, h, i].nonzero()[:, 0].tolist()) == best


def test_top_k_keeps_the_earlier_of_equal_scores():
    assert last_row(sp.get_selector("top_k", k=2), 0.1, 0.2, 0.2, 0.2, 0.3) == [1, 4]
    assert last_row(sp.get_selector("top_k", k=3), 0.5, 0.5, 0.5, 0.5, 0.5) == [0, 1, 2]


def test_top_k_does_not_count_invisible_blocks():
    mass = scores() + 10 * ~WHOLE.visible()
    kept = sp.get_selector("top_k", k=2)(mass, WHOLE)
    assert ((kept & WHOLE.visible()).sum(-1) == torch.arange(1, 11).clamp(max=2)).all()


def test_top_k_accepts_a_separate_k_for_each_row():
    values = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 2.0], [0.0, 5.0, 5.0]])
    kept = top_k(values, torch.tensor([[2], [0], [3]]))
    assert kept.tolist() == [[True, False, True], [False] * 3, [True] * 3]


@given(n=st.integers(1, 20), k=st.integers(0, 25), seed=st.integers(0, 99))
def test_top_k_equals_sorting_by_score_and_index(n, k, seed):
    values = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed)).float()  # many ties
    assert set(top_k(values, k).nonzero()[:, 0].tolist()) == reference.largest(values.tolist(), k)


# cumulative ---------------------------------------------------------------------------------------------------


def test_reach_keeps_the_block_that_crosses_the_share_and_within_drops_it():
    mass = (0.125, 0.5, 0.25, 0.0625, 0.0625)
    assert last_row(sp.get_selector("cumulative", share=0.6), *mass) == [1, 2]
    assert last_row(sp.get_selector("cumulative", share=0.6, edge="within"), *mass) == [1]


def test_both_edges_keep_the_same_blocks_if_they_hold_exactly_the_share():
    mass = (0.125, 0.5, 0.25, 0.0625, 0.0625)
    for edge in ("reach", "within"):
        assert last_row(sp.get_selector("cumulative", share=0.75, edge=edge), *mass) == [1, 2]


def test_cumulative_keeps_the_earlier_of_equal_blocks():
    assert last_row(sp.get_selector("cumulative", share=0.5), 0.25, 0.25, 0.25, 0.25) == [0, 1]


def test_a_share_of_one_keeps_all_blocks_and_a_smaller_share_only_blocks_with_mass():
    mass = (0.5, 0.0, 0.5, 0.0)
    assert last_row(sp.get_selector("cumulative", share=1.0), *mass) == [0, 1, 2, 3]
    assert last_row(sp.get_selector("cumulative", share=0.999999), *mass) == [0, 2]


def test_rows_without_mass_keep_no_block():
    kept = sp.get_selector("cumulative", share=0.9)(torch.zeros(1, 1, 10, 10), WHOLE)
    assert not kept.any()


def test_scaling_all_scores_changes_nothing():
    mass = scores()
    for edge in ("reach", "within"):
        selector = sp.get_selector("cumulative", share=0.7, edge=edge)
        assert torch.equal(selector(mass * 64, WHOLE), selector(mass, WHOLE))


def test_invisible_blocks_are_neither_counted_nor_kept():
    mass = scores()
    for scope in ("row", "head"):
        selector = sp.get_selector("cumulative", share=0.7, scope=scope)
        kept = selector(mass + 100 * ~WHOLE.visible(), WHOLE)
        assert torch.equal(kept, selector(mass, WHOLE))
        assert not (kept & ~WHOLE.visible()).any()


@pytest.mark.parametrize("scope", ["row", "head"])
@given(share=st.floats(0.05, 0.99), seed=st.integers(0, 99))
def test_reach_meets_the_share_with_the_fewest_blocks(scope, share, seed):
    mass = scores(seed=seed) * WHOLE.visible()
    kept = sp.get_selector("cumulative", share=share, scope=scope)(mass, WHOLE)
    if scope == "row":
        tables, choices = mass.flatten(0, 2), kept.flatten(0, 2)
    else:
        tables, choices = mass.flatten(2).flatten(0, 1), kept.flatten(2).flatten(0, 1)
    for values, choice in zip(tables.double(), choices, strict=True):
        assert values[choice].sum() >= share * values.sum() * (1 - 1e-6)
        assert values[choice].sum() - values[choice].min() < share * values.sum() * (1 + 1e-6)
        if not choice.all():
            assert values[choice].min() >= values[~choice].max()


@pytest.mark.parametrize("scope", ["row", "head"])
@given(share=st.floats(0.05, 0.99), seed=st.integers(0, 99))
def test_within_keeps_at_most_the_share(scope, share, seed):
    mass = scores(seed=seed) * WHOLE.visible()
    kept = sp.get_selector("cumulative", share=share, scope=scope, edge="within")(mass, WHOLE)
    dim = -1 if scope == "row" else (-2, -1)
    assert ((mass * kept).sum(dim) <= share * mass.sum(dim) * (1 + 1e-6)).all()


@given(
    kind=st.sampled_from(["spread", "peaked", "ties", "empty"]),
    share=st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.875, 0.9, 1.0]),
    edge=st.sampled_from(["reach", "within"]),
    is_forced=st.booleans(),
    dims=st.sampled_from([1, 2]),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    seed=st.integers(0, 99),
)
def test_cutoffs_and_bins_select_the_same_blocks_as_sorting(kind, share, edge, is_forced, dims, shape, seed):
    # Sums of ties are whole numbers and may equal the share, which fp32 and fp64 round differently unless it is exact.
    assume(kind != "ties" or share not in (0.3, 0.9))
    source = torch.Generator().manual_seed(seed)
    mass = {
        "spread": lambda: torch.rand(2, 3, *shape, generator=source),
        "peaked": lambda: torch.randn(2, 3, *shape, generator=source).mul(4).exp(),
        "ties": lambda: torch.randint(0, 4, (2, 3, *shape), generator=source).float(),
        "empty": lambda: torch.zeros(2, 3, *shape),
    }[kind]()
    forced = torch.rand(1, 1, *shape, generator=source) < 0.1 if is_forced else None
    flat = None if forced is None else forced.expand_as(mass).flatten(-dims)
    want = cumulative(mass.flatten(-dims), share, edge, forced=flat).view_as(mass)
    assert torch.equal(reaching(mass, torch.full((1,) * dims, share), forced, dims, edge == "within"), want)
    assert torch.equal(cumulative(mass, share, edge, forced=forced, dims=dims), want)
    if dims == 2:
        assert torch.equal(reaching_by_bins(mass, share, forced, edge == "within"), want)


def test_heads_of_many_blocks_select_the_same_blocks_as_sorting():
    mass = torch.randn(1, 2, 100, 100, generator=torch.Generator().manual_seed(0)).mul(3).exp()
    assert mass[0, 0].numel() >= MIN_BINNED_ENTRIES
    for edge in ("reach", "within"):
        want = cumulative(mass.flatten(2), 0.9, edge).view_as(mass)
        assert torch.equal(cumulative(mass, 0.9, edge, dims=2), want)


def test_a_budget_for_the_whole_head_spends_fewer_blocks_on_spread_rows():
    prompt = sp.Prompt(q_len=64, kv_len=256, block_size=16)
    mass = torch.zeros(1, 1, 4, 16)
    mass[0, 0, 0, 0] = mass[0, 0, 1, 0] = mass[0, 0, 2, 0] = 1
    mass[0, 0, 3] = 1 / 16
    by_row = sp.get_selector("cumulative", share=0.8)(mass, prompt)
    by_head = sp.get_selector("cumulative", share=0.8, scope="head")(mass, prompt)
    assert by_row.sum(-1).tolist() == [[[1, 1, 1, 13]]]
    assert by_head.sum(-1).tolist() == [[[1, 1, 1, 4]]], (
        "0.8 of 4 is 3.2: 3 in the peaked rows, and 4 blocks for the rest"
    )


@pytest.mark.parametrize(("name", "options"), [("top_k", {"k": 2}), ("cumulative", {"share": 0.5})])
def test_selectors_accept_any_number_of_rows_and_heads(name, options):
    selector = sp.get_selector(name, **options)
    single = scores()
    stacked = torch.cat([single, single.flip(1)])
    kept = selector(stacked, WHOLE)
    assert kept.dtype == torch.bool
    assert torch.equal(kept[:1], selector(single, WHOLE))
    assert torch.equal(kept[1:], selector(single, WHOLE).flip(1))

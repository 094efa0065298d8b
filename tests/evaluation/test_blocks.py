"""Measures of tables against sums over the naive attention probabilities."""

import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill import evaluation

BLOCKS = [0, 2, 6]


@pytest.fixture
def case():
    q, k, _ = reference.random_qkv(q_len=100, kv_len=150, scale=3)
    prompt = sp.Prompt(q_len=100, kv_len=150, block_size=16)
    keep = torch.rand(1, 6, prompt.n_q, prompt.n_k) < 0.4
    keep = (keep | prompt.diagonal()) & prompt.visible()
    return q, k, prompt, keep


def test_true_mass_is_that_of_the_estimator(case):
    q, k, prompt, _ = case
    whole = sp.get_estimator("true_mass")(q, k, prompt)
    torch.testing.assert_close(evaluation.true_mass(q, k, prompt, BLOCKS), whole[:, :, BLOCKS])


def test_recall_is_the_kept_share_of_the_naive_probabilities(case):
    q, k, prompt, keep = case
    probability = reference.probabilities(q, k, reference.token_mask(prompt)[:, None])
    kept_tokens = keep.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :100, :150]
    by_row = (probability * kept_tokens).sum(-1)  # [1, 6, 100], each row's share
    expected = torch.stack([by_row[:, :, i * 16 : (i + 1) * 16].mean(-1) for i in BLOCKS], dim=-1)
    found = evaluation.recall(evaluation.true_mass(q, k, prompt, BLOCKS), keep, BLOCKS)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_density_counts_visible_blocks(case):
    _, _, prompt, keep = case
    visible = [(i, j) for i in range(prompt.n_q) for j in range(prompt.n_k) if prompt.visible()[0, 0, i, j]]
    for head in range(6):
        expected = sum(bool(keep[0, head, i, j]) for i, j in visible) / len(visible)
        assert evaluation.density(keep, prompt)[0, head].item() == pytest.approx(expected)
    assert evaluation.density(prompt.visible(), prompt).item() == 1
    some = [(i, j) for i, j in visible if i in BLOCKS]
    for head in range(6):
        expected = sum(bool(keep[0, head, i, j]) for i, j in some) / len(some)
        assert evaluation.density(keep, prompt, BLOCKS)[0, head].item() == pytest.approx(expected)


def test_density_of_a_row_of_only_padding_is_zero():
    prompt = sp.Prompt(q_len=32, block_size=16, left_padding=[32, 0])
    assert evaluation.density(prompt.visible(), prompt).tolist() == [[0], [1]]


def test_no_table_reaches_its_recall_with_fewer_blocks_than_the_oracle(case):
    q, k, prompt, keep = case
    mass = evaluation.true_mass(q, k, prompt, BLOCKS)
    reached = float(evaluation.recall(mass, keep, BLOCKS).mean())
    needed = evaluation.oracle_density(mass, reached, prompt, BLOCKS)
    density = keep[:, :, BLOCKS].sum() / prompt.visible()[:, :, BLOCKS].expand_as(keep[:, :, BLOCKS]).sum()
    assert needed <= float(density)
    # One block less than the oracle takes doesn't reach the recall.
    ranked = mass.flatten().sort(descending=True).values.double()
    count = round(needed * int(prompt.visible()[:, :, BLOCKS].expand_as(mass).sum()))
    assert ranked[: count - 1].sum() < reached * ranked.sum() <= ranked[:count].sum() + 1e-9


@pytest.mark.parametrize("blocks", [[], [-1], [7], [0, 99]])
def test_query_blocks_outside_the_prompt_are_refused(case, blocks):
    q, k, prompt, _ = case
    with pytest.raises(ValueError, match="query_blocks must be some of 0 to 6"):
        evaluation.true_mass(q, k, prompt, blocks)


def test_the_oracle_of_a_head_takes_its_largest_blocks_until_they_reach_the_share(case):
    q, k, prompt, keep = case
    mass = reference.block_mass(q, k, prompt)[:, :, BLOCKS]
    reached = (mass * keep[:, :, BLOCKS]).sum((2, 3)) / mass.sum((2, 3))
    found = evaluation.oracle_density_by_head(evaluation.true_mass(q, k, prompt, BLOCKS), reached, prompt, BLOCKS)
    visible = int(prompt.visible()[:, :, BLOCKS].sum())
    for head in range(6):
        needed = reference.fewest(mass[0, head].flatten().tolist(), float(reached[0, head]) - 1e-6)
        assert round(float(found[0, head]) * visible) == needed
    assert bool((found <= evaluation.density(keep, prompt, BLOCKS)).all())


def test_oracle_density_is_at_most_one(case):
    q, k, prompt, _ = case
    mass = evaluation.true_mass(q, k, prompt, BLOCKS)
    beyond = 1 + 1e-6  # a share of one, rounded up
    assert evaluation.oracle_density(mass, beyond, prompt, BLOCKS) == 1
    shares = torch.full((1, 6), beyond)
    assert evaluation.oracle_density_by_head(mass, shares, prompt, BLOCKS).tolist() == [[1.0] * 6]


def test_the_gap_is_the_blocks_of_a_table_over_those_of_the_oracle(case):
    q, k, prompt, keep = case
    mass = reference.block_mass(q, k, prompt)[:, :, BLOCKS]
    kept = keep[:, :, BLOCKS]
    reached = float((mass * kept).sum() / mass.sum())
    needed = reference.fewest(mass.flatten().tolist(), reached - 1e-6)
    found = evaluation.oracle_gap(evaluation.true_mass(q, k, prompt, BLOCKS), keep, prompt, BLOCKS)
    assert found == pytest.approx(int(kept.sum()) / needed)
    assert found > 1.5  # a random table


def test_the_table_of_the_oracle_has_no_gap_and_overlaps_with_itself(case):
    q, k, prompt, _ = case
    mass = evaluation.true_mass(q, k, prompt, range(prompt.n_q))
    best = (mass >= mass.flatten().sort(descending=True).values[60]) & prompt.visible()
    every = range(prompt.n_q)
    assert evaluation.oracle_gap(mass, best, prompt, every) == pytest.approx(1)
    assert evaluation.overlap(mass, best, prompt, every) == 1
    least = prompt.visible() & (mass <= mass[prompt.visible().expand_as(mass)].sort().values[60])
    assert evaluation.overlap(mass, least, prompt, every) == 0
    assert evaluation.oracle_gap(mass, least, prompt, every) > 10


@given(st.integers(0, 10_000), st.floats(0.02, 0.98))
@example(252, 0.4765625)  # rounded to fp32, the mean density of these heads is below the overall density
def test_no_table_beats_the_oracle_even_after_rounding(seed, share):
    generator = torch.Generator().manual_seed(seed)
    prompt = sp.Prompt(q_len=320, block_size=16)
    every = range(prompt.n_q)
    scores = 2 * torch.randn(1, 2, 20, 20, generator=generator)
    mass = scores.masked_fill(~prompt.visible(), -torch.inf).softmax(-1)
    best = mass >= mass.flatten().quantile(1 - share)  # the oracle's table
    some = torch.rand(1, 2, 20, 20, generator=generator) < share
    assert evaluation.oracle_gap(mass, best & prompt.visible(), prompt, every) == pytest.approx(1, abs=1e-2)
    for keep in (best, some):
        keep = (keep | prompt.diagonal()) & prompt.visible()
        assert evaluation.oracle_gap(mass, keep, prompt, every) >= 1
        reached = evaluation.recall(mass.double() / mass.double().sum(-1, keepdim=True), keep, every).mean(-1)
        needed = evaluation.oracle_density_by_head(mass, reached, prompt, every)
        assert bool((needed <= evaluation.density(keep, prompt) + 1e-6).all())


def test_overlap_is_the_share_of_blocks_in_common_with_the_best_table_of_the_same_size(case):
    q, k, prompt, keep = case
    mass, kept = reference.block_mass(q, k, prompt)[:, :, BLOCKS], keep[:, :, BLOCKS]
    found = evaluation.true_mass(q, k, prompt, BLOCKS)

    def shared(mass, kept):
        chosen = {i for i, one in enumerate(kept.flatten().tolist()) if one}
        return len(chosen & reference.largest(mass.flatten().tolist(), len(chosen))) / len(chosen)

    by_head = evaluation.overlap_by_head(found, keep, prompt, BLOCKS)
    for head in range(6):
        assert float(by_head[0, head]) == pytest.approx(shared(mass[0, head], kept[0, head]))
    assert evaluation.overlap(found, keep, prompt, BLOCKS) == pytest.approx(shared(mass, kept))


def test_overlap_breaks_ties_in_favour_of_the_table_and_ignores_invisible_blocks():
    prompt = sp.Prompt(q_len=48, block_size=16)
    mass = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25]])[None, None]
    keep = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 1]]).bool()[None, None]  # two of them invisible
    # Three of six: the block of 1, one of the three blocks of 0.5, and none of 0.25.
    assert evaluation.overlap(mass, keep, prompt, [0, 1, 2]) == pytest.approx(2 / 3)
    assert evaluation.overlap(mass, prompt.visible(), prompt, [0, 1, 2]) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_worst_is_the_mean_of_the_lowest(values, share):
    lowest = sorted(values)[: max(1, -(-round(share * len(values) * 1000) // 1000))]
    expected = sum(lowest) / len(lowest)
    assert evaluation.worst(torch.tensor(values, dtype=torch.float64), share) == pytest.approx(expected)


def test_the_number_of_worst_values_is_rounded_up():
    assert evaluation.worst(torch.arange(150.0)) == 0.5, "the mean of the two lowest"
    assert evaluation.worst(torch.arange(100.0)) == 0
    assert evaluation.worst(torch.arange(3.0)) == 0


def test_worst_refuses_no_values_and_shares_out_of_range():
    with pytest.raises(ValueError, match="at least one value"):
        evaluation.worst(torch.empty(0))
    for share in (0, 1.1):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
            evaluation.worst(torch.ones(3), share)


@given(st.integers(1, 300), st.integers(1, 40))
def test_spread_blocks_have_the_requested_count_and_include_the_last_block(n_q, count):
    found = evaluation.spread_blocks(n_q, count)
    assert len(found) == min(count, n_q)
    assert found == sorted(set(found))
    assert found[0] >= 0
    assert found[-1] == n_q - 1
    with pytest.raises(ValueError, match="count must be a whole number"):
        evaluation.spread_blocks(n_q, 0)


def test_query_blocks_that_are_not_whole_numbers_are_refused(case):
    q, k, prompt, _ = case
    with pytest.raises(ValueError, match=r"query_blocks must be some of 0 to 6, got \[0.5\]"):
        evaluation.true_mass(q, k, prompt, [0.5])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_and_infinity_are_refused(case, value, which):
    q, k, prompt, _ = case
    (q, k)[which][0, 0, 3, 0] = value
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        evaluation.true_mass(q, k, prompt, BLOCKS)
    with pytest.raises(ValueError, match="got NaN"):
        evaluation.worst(torch.tensor([1.0, float("nan")]))


def test_masses_tables_and_query_blocks_of_the_wrong_size_are_refused(case):
    q, k, prompt, keep = case
    mass = evaluation.true_mass(q, k, prompt, BLOCKS)
    for measure in (evaluation.overlap, evaluation.overlap_by_head, evaluation.oracle_gap):
        with pytest.raises(ValueError, match="query_blocks must be the 3"):
            measure(mass, keep, prompt, [0])
    for blocks in ([0], [0, 2, 99]):
        with pytest.raises(ValueError, match="query_blocks must be the 3"):
            evaluation.recall(mass, keep, blocks)
    for table in (keep[..., 1:], keep.float(), keep[0]):
        with pytest.raises(ValueError, match=r"keep must be bool \[batch, heads, 7, 10\]"):
            evaluation.density(table, prompt)
    with pytest.raises(ValueError, match="keep must be bool"):
        evaluation.recall(mass, keep[..., 1:], BLOCKS)
    with pytest.raises(ValueError, match="mass must be that of 1 query blocks"):
        evaluation.oracle_density(mass, 0.9, prompt, [0])
    for share in (2.0, float("nan"), -0.1):
        with pytest.raises(ValueError, match=r"share must lie in \[0, 1\]"):
            evaluation.oracle_density(mass, share, prompt, BLOCKS)

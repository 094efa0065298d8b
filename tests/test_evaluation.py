"""Recall and density against sums over the naive attention probabilities."""

import pytest
import reference
import torch

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


def test_no_table_reaches_a_recall_with_fewer_blocks_than_the_oracle_density(case):
    q, k, prompt, keep = case
    mass = evaluation.true_mass(q, k, prompt, BLOCKS)
    reached = float(evaluation.recall(mass, keep, BLOCKS).mean())
    needed = evaluation.oracle_density(mass, reached, prompt, BLOCKS)
    kept = keep[:, :, BLOCKS].sum() / prompt.visible()[:, :, BLOCKS].expand_as(keep[:, :, BLOCKS]).sum()
    assert needed <= float(kept)
    # And with one block less than the oracle takes, the recall isn't reached.
    ranked = mass.flatten().sort(descending=True).values.double()
    count = round(needed * int(prompt.visible()[:, :, BLOCKS].expand_as(mass).sum()))
    assert ranked[: count - 1].sum() < reached * ranked.sum() <= ranked[:count].sum() + 1e-9


@pytest.mark.parametrize("blocks", [[], [-1], [7], [0, 99]])
def test_query_blocks_outside_the_prompt_are_refused(case, blocks):
    q, k, prompt, _ = case
    with pytest.raises(ValueError, match="query_blocks must be some of 0 to 6"):
        evaluation.true_mass(q, k, prompt, blocks)

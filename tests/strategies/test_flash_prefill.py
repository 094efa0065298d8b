"""FlashPrefill equals its formulas in plain loops, and has the properties that its docstring states."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.estimators import token_block
from tests.estimators.token_prompts import every_prompt, inputs


def flash(alpha, size=16, **guards):
    return sp.get_strategy(
        "flash_prefill", **{"sink": 0, "local": 0, "last": 0, **guards}, alpha=alpha, block_size=size
    )


def near_the_highest(scores, alpha, prompt):
    """Visible blocks whose score is at least alpha times the highest of their row."""
    seen = reference.visible(prompt, scores.shape[0]).expand_as(scores)
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for *row, j in seen.nonzero().tolist():
        highest = max(scores[*row][seen[*row]].tolist())
        keep[*row, j] = scores[*row, j] >= alpha * highest
    return keep


# Against plain loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_group", [False, True])
@every_prompt
def test_scores_equal_plain_loops(sizes, per_group):
    q, k, prompt = inputs(**sizes)
    scores = sp.get_estimator("token_by_mean", per_group=per_group)(q, k, prompt)
    want = reference.token_by_mean(q, k, prompt, per_group)
    torch.testing.assert_close(scores.double(), want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.08, 0.5])
@every_prompt
def test_keeps_blocks_that_reach_alpha_times_the_highest_score_and_the_own_blocks(sizes, alpha):
    q, k, prompt = inputs(**sizes)
    own = reference.diagonal(prompt, len(q))
    want = near_the_highest(reference.token_by_mean(q, k, prompt), alpha, prompt) | own
    assert torch.equal(flash(alpha).keep(q, k, prompt), want)


@every_prompt
def test_heads_of_a_group_keep_blocks_that_reach_alpha_times_their_highest_sum(sizes):
    q, k, prompt = inputs(**sizes)
    scores = reference.token_by_mean(q, k, prompt, per_group=True)
    want = near_the_highest(scores, 0.5, prompt) | reference.diagonal(prompt, len(q))
    assert torch.equal(flash(0.5, per_group=True).keep(q, k, prompt), want)


def test_groups_of_one_head_select_as_single_heads():
    q, k, prompt = inputs(q_len=150, heads=4, kv_heads=4)
    assert torch.equal(flash(0.5, per_group=True).keep(q, k, prompt), flash(0.5).keep(q, k, prompt))


def test_the_inputs_of_this_file_skip_blocks():
    q, k, prompt = inputs(q_len=300)
    for alpha in (0.08, 0.5):
        skipped = prompt.visible() & ~flash(alpha).keep(q, k, prompt)
        assert skipped.any((2, 3)).all()


@pytest.mark.parametrize("tokens", [2048, 2000, 1921])
def test_default_guards_are_two_sink_blocks_a_window_of_four_blocks_and_two_dense_query_blocks(tokens):
    q, k, prompt = inputs(q_len=tokens, heads=2, kv_heads=1, size=128)
    keep = sp.get_strategy("flash_prefill", alpha=1).keep(q, k, prompt)
    highest = sp.get_estimator("token_by_mean")(q, k, prompt).argmax(-1)
    for h in range(2):
        for i in range(16):
            want = {0, 1, *range(i - 3, i + 1), int(highest[0, h, i])} if i < 14 else set(range(16))
            assert set(keep[0, h, i].nonzero()[:, 0].tolist()) == want & set(range(i + 1))


# Properties -----------------------------------------------------------------------------------------------

a_seed = st.integers(0, 99)


@given(tokens=st.sampled_from([40, 63, 129, 200]), scale=st.sampled_from([0.1, 4.0, 50.0]), seed=a_seed)
def test_alpha_of_zero_keeps_all_blocks_and_alpha_of_one_only_the_highest(tokens, scale, seed):
    q, k, prompt = inputs(q_len=tokens, scale=scale, seed=seed)
    assert torch.equal(flash(0).keep(q, k, prompt), prompt.visible().expand(1, 6, -1, -1))
    highest = sp.get_estimator("token_by_mean")(q, k, prompt).argmax(-1, keepdim=True)
    want = torch.zeros(1, 6, prompt.n_q, prompt.n_k, dtype=torch.bool).scatter(-1, highest, True) | prompt.diagonal()
    assert torch.equal(flash(1).keep(q, k, prompt), want)


@given(tokens=st.sampled_from([40, 63, 129, 200]), seed=a_seed)
def test_a_constant_added_to_all_logits_of_a_query_block_changes_nothing(tokens, seed):
    q, k, prompt = inputs(q_len=tokens, seed=seed)
    k[..., -1] = 1
    estimator = sp.get_estimator("token_by_mean")
    before = estimator(q, k, prompt)
    constants = torch.linspace(-20, 20, prompt.n_q).repeat_interleave(16)[:tokens]
    q[..., -1] += constants
    torch.testing.assert_close(estimator(q, k, prompt), before, rtol=1e-4, atol=1e-9)


@given(low=st.floats(0, 1), high=st.floats(0, 1), seed=a_seed)
def test_a_larger_alpha_keeps_a_subset(low, high, seed):
    q, k, prompt = inputs(q_len=200, seed=seed)
    low, high = sorted((low, high))
    assert not (flash(high).keep(q, k, prompt) & ~flash(low).keep(q, k, prompt)).any()


@pytest.mark.parametrize("chunk", [16, 48, 160])
def test_chunks_of_whole_blocks_select_the_rows_of_the_whole_prompt(chunk):
    q, k, prompt = inputs(q_len=333)
    strategy = flash(0.3, sink=20, local=40)
    whole = strategy.keep(q, k, prompt)
    for begin in range(0, 333, chunk):
        end = min(begin + chunk, 333)
        part = strategy.keep(q[:, :, begin:end], k[:, :, :end])
        rows = slice(begin // 16, begin // 16 + part.shape[2])
        assert torch.equal(part, whole[:, :, rows, : part.shape[3]])
        assert not whole[:, :, rows, part.shape[3] :].any()


def test_documents_of_whole_blocks_are_selected_as_separate_prompts():
    q, k, _ = inputs(q_len=160)
    strategy = flash(0.3, sink=20, local=40)
    together = strategy.keep(q, k, sp.Prompt(q_len=160, block_size=16, documents=[0] * 96 + [1] * 64))
    for blocks in (slice(0, 6), slice(6, 10)):
        tokens = slice(blocks.start * 16, blocks.stop * 16)
        assert torch.equal(together[..., blocks, blocks], strategy.keep(q[:, :, tokens], k[:, :, tokens]))
    assert not together[..., 6:, :6].any()


def test_one_query_that_attends_to_a_block_is_enough_to_keep_it():
    q, k, prompt = inputs(q_len=320, scale=0.1)
    k[:, :, 80:96] += 3
    q[:, :, 300] = 5
    scores = sp.get_estimator("token_by_mean")(q, k, prompt)
    assert (scores[:, :, 300 // 16].argmax(-1) == 5).all()
    assert not flash(0.5).keep(q, k, prompt)[:, :, 300 // 16, 6:18].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_thousands_give_finite_shares_that_sum_to_one(dtype):
    q, k, prompt = inputs(q_len=200)
    scores = sp.get_estimator("token_by_mean")((q * 1000).to(dtype), k.to(dtype), prompt)
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, 6, prompt.n_q))


@pytest.mark.parametrize(("logits", "blocks"), [(1, 8), (2**24, 3), (2**24, 1000)])
@every_prompt
def test_scores_do_not_depend_on_the_number_of_query_blocks_per_step(sizes, logits, blocks, monkeypatch):
    q, k, prompt = inputs(**sizes)
    estimator = sp.get_estimator("token_by_mean")
    before = estimator(q, k, prompt)
    monkeypatch.setattr(token_block, "MAX_LOGITS_CPU", logits)
    monkeypatch.setattr(token_block, "MAX_QUERY_BLOCKS_CPU", blocks)
    torch.testing.assert_close(estimator(q, k, prompt), before, rtol=1e-4, atol=1e-9)


def test_logits_in_memory_stay_within_the_limit(monkeypatch):
    counts = []

    def mean_logits(q, k):
        counts.append(q.shape[1] * q.shape[2] * prompt.n_k)
        return product(q, k)

    product = token_block.mean_logits
    q, k, prompt = inputs(q_len=333)
    monkeypatch.setattr(token_block, "mean_logits", mean_logits)
    monkeypatch.setattr(token_block, "MAX_LOGITS_CPU", 3 * 6 * 16 * prompt.n_k)
    sp.get_estimator("token_by_mean")(q, k, prompt)
    assert max(counts) == token_block.MAX_LOGITS_CPU
    assert len(counts) == 7


@pytest.mark.parametrize("per_group", [1, None, "yes"])
def test_per_group_is_true_or_false(per_group):
    with pytest.raises(ValueError, match="per_group must be True or False"):
        sp.get_strategy("flash_prefill", per_group=per_group)


# max_relative ---------------------------------------------------------------------------------------------


@given(alpha=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), seed=a_seed)
def test_max_relative_equals_comparing_with_the_highest_visible_score(alpha, seed):
    prompt = sp.Prompt(q_len=64, kv_len=160, block_size=16)
    source = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (1, 2, 4, 10), generator=source) / 4  # with ties and scores exactly at the threshold
    kept = sp.get_selector("max_relative", alpha=alpha)(scores + 100 * ~prompt.visible(), prompt)
    assert torch.equal(kept & prompt.visible(), near_the_highest(scores, alpha, prompt))


@pytest.mark.parametrize("alpha", [-0.1, 1.01, math.nan, math.inf, True, "0.1", None])
def test_alpha_out_of_range_is_refused(alpha):
    for get, name in ((sp.get_selector, "max_relative"), (sp.get_strategy, "flash_prefill")):
        with pytest.raises(ValueError, match="alpha must be"):
            get(name, alpha=alpha)

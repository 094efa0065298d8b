"""SampleAttention equals its formulas in plain loops, and has the properties that its docstring states."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.estimators import sampled_mass, window_blocks

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "127": {"q_len": 127},
    "a token after whole blocks": {"q_len": 129},
    "300": {"q_len": 300, "heads": 4, "kv_heads": 1},
    "batch, no groups": {"q_len": 100, "batch": 2, "heads": 4, "kv_heads": 4},
    "chunk": {"q_len": 64, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "chunk under a block": {"q_len": 5, "kv_len": 205},
    "chunk with total_len": {"q_len": 41, "kv_len": 205, "total_len": 400},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
    "padded chunk": {"q_len": 41, "kv_len": 205, "batch": 2, "heads": 4, "left_padding": [20, 170]},
    "all padding": {"q_len": 64, "batch": 2, "heads": 2, "left_padding": [64, 3]},
    "more blocks than dimensions": {"q_len": 300, "dim": 8},
}
every_prompt = pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)


def sample(**options):
    return sp.get_strategy("sample_attention", **{"block_size": 16, **options})


def inputs(left_padding=None, total_len=None, scale=3.0, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding, total_len=total_len)


def near(prompt, batch, share):
    """Blocks with a token pair closer than a share of the real tokens, including future blocks."""

    def rule(b, rows, keys):
        tokens = (prompt.total_len or prompt.kv_len) - reference.padding_of(prompt, b)
        return rows.start + prompt.offset - (keys.stop - 1) < math.ceil(share * tokens)

    return reference.block_table(prompt, batch, rule)


def sampled_rows(prompt, step):
    return [row for row in range(prompt.q_len) if (prompt.q_len - 1 - row) % step == 0]


def outside(q, k, prompt, step, share):
    """Mean attention of the sampled real rows outside the window, by block: float64 [B, Hq, n_k]."""
    p = reference.probabilities(q, k, reference.token_mask(prompt, len(q))[:, None])
    window = near(prompt, len(q), share)
    out = torch.zeros(*q.shape[:2], prompt.n_k, dtype=torch.float64)
    for b in range(len(q)):
        rows = [r for r in sampled_rows(prompt, step) if r + prompt.offset >= reference.padding_of(prompt, b)]
        for row in rows:
            for j in range(prompt.n_k):
                keys = reference.key_block(prompt, j)
                if not window[b, 0, row // 16, j]:
                    out[b, :, j] += p[b, :, row, keys.start : keys.stop].sum(-1) / len(rows)
    return out


# Against plain loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "share"), [(20, 0.08), (3, 0.3), (1, 0.01)])
@every_prompt
def test_scores_equal_plain_loops(sizes, step, share):
    q, k, prompt = inputs(**sizes)
    scores = sp.get_estimator("sampled_mass", stride=step, window=share)(q, k, prompt)
    torch.testing.assert_close(scores[:, :, 0].double(), outside(q, k, prompt, step, share), rtol=1e-4, atol=1e-6)


@every_prompt
def test_without_a_window_all_attention_counts(sizes):
    q, k, prompt = inputs(**sizes)
    scores = sp.get_estimator("sampled_mass", stride=7)(q, k, prompt)[:, :, 0]
    real = prompt.start() < prompt.kv_len
    torch.testing.assert_close(scores.sum(-1), real[:, None].float().expand(scores.shape[:2]))
    want = outside(q, k, prompt, 7, -1e9)
    torch.testing.assert_close(scores.double(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("step", "alpha", "share"), [(20, 0.95, 0.08), (5, 0.6, 0.2)])
@every_prompt
def test_keeps_the_window_and_the_fewest_columns_that_hold_alpha_of_the_rest(sizes, step, alpha, share):
    q, k, prompt = inputs(**sizes)
    keep = sample(sample=1 / step, alpha=alpha, window=share).keep(q, k, prompt)
    columns, seen = outside(q, k, prompt, step, share), reference.visible(prompt, len(q))
    want = near(prompt, len(q), share).repeat(1, q.shape[1], 1, 1)
    for b, h in torch.cartesian_prod(torch.arange(len(q)), torch.arange(q.shape[1])).tolist():
        mass = columns[b, h].tolist()
        if sum(mass) > 0:
            want[b, h, :, list(reference.largest(mass, reference.fewest(mass, alpha)))] = True
    assert torch.equal(keep, want & seen)


def test_the_inputs_of_this_file_skip_blocks():
    q, k, prompt = inputs(q_len=300)
    for options in ({}, {"alpha": 0.6, "sample": 0.2, "window": 0.2}):
        assert (prompt.visible() & ~sample(**options).keep(q, k, prompt)).any((2, 3)).all()


@pytest.mark.parametrize("rows", [1, 3, 1000])
@every_prompt
def test_scores_do_not_depend_on_the_number_of_queries_per_step(sizes, rows, monkeypatch):
    q, k, prompt = inputs(**sizes)
    estimator = sp.get_estimator("sampled_mass", stride=5, window=0.1)
    before = estimator(q, k, prompt)
    monkeypatch.setattr(sampled_mass, "MAX_ROWS", rows)
    torch.testing.assert_close(estimator(q, k, prompt), before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.01, 0.08, 0.5, 1.0])
@every_prompt
def test_window_blocks_equal_plain_loops(sizes, share):
    _, _, prompt = inputs(**sizes)
    assert torch.equal(window_blocks(share, prompt), near(prompt, prompt.batch, share))


# Properties -----------------------------------------------------------------------------------------------

a_seed = st.integers(0, 99)


@given(alpha=st.sampled_from([0.3, 0.8, 0.95]), tokens=st.sampled_from([63, 129, 200]), seed=a_seed)
def test_the_sampled_queries_keep_a_share_alpha_of_their_attention(alpha, tokens, seed):
    q, k, prompt = inputs(q_len=tokens, seed=seed)
    keep = sample(sample=0.1, alpha=alpha).keep(q, k, prompt)
    p = reference.probabilities(q, k, reference.token_mask(prompt)[:, None])
    kept = keep.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :tokens, :tokens]
    assert ((p * kept).sum(-1)[:, :, sampled_rows(prompt, 10)].mean(-1) >= alpha - 1e-5).all()


@given(low=st.floats(0.01, 1), high=st.floats(0.01, 1), option=st.sampled_from(["alpha", "window"]), seed=a_seed)
def test_a_larger_alpha_keeps_a_superset_and_an_alpha_or_window_of_one_is_dense(low, high, option, seed):
    q, k, prompt = inputs(q_len=200, seed=seed)
    low, high = sorted((low, high))
    if option == "alpha":
        assert not (sample(alpha=low).keep(q, k, prompt) & ~sample(alpha=high).keep(q, k, prompt)).any()
    everything = prompt.visible().expand(1, 6, -1, -1)
    assert torch.equal(sample(window=1.0).keep(q, k, prompt), everything)
    assert torch.equal(sample(alpha=1.0).keep(q, k, prompt), everything)


def test_a_key_that_all_queries_attend_to_is_the_only_column_outside_the_window():
    q, k, prompt = inputs(q_len=320, scale=0.01)
    q[..., 0], k[..., 0] = 10, 0
    k[:, :, 20, 0] = 50
    keep = sample(window=0.05, alpha=0.9).keep(q, k, prompt)
    column = torch.zeros(20, 20, dtype=torch.bool)
    column[:, 20 // 16] = True
    want = (column | near(prompt, 1, 0.05)[0, 0]) & prompt.visible()[0, 0]
    assert torch.equal(keep, want.expand(1, 6, -1, -1))


@pytest.mark.parametrize("name", ["sample", "alpha", "window"])
@pytest.mark.parametrize("value", [0, 1.1, "0.5", True, None])
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        sample(**{name: value})


def test_options_of_the_estimator_out_of_range_are_refused():
    with pytest.raises(ValueError, match="stride must be"):
        sp.get_estimator("sampled_mass", stride=0)
    with pytest.raises(ValueError, match="window must be"):
        sp.get_estimator("sampled_mass", window=0)


def test_packed_documents_are_refused():
    q, k, _ = inputs(q_len=64)
    with pytest.raises(ValueError, match="sample_attention cannot make one table for packed documents"):
        sample().keep(q, k, sp.Prompt(64, block_size=16, documents=[0] * 32 + [1] * 32))

"""ProxyAttn equals its formulas in plain loops: one ranking for the heads of a group, one budget for each head."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.estimators import proxy_heads

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "127": {"q_len": 127},
    "a token after whole blocks": {"q_len": 129},
    "300": {"q_len": 300, "heads": 4, "kv_heads": 1},
    "batch, no groups": {"q_len": 100, "batch": 2, "heads": 4, "kv_heads": 4},
    "chunk": {"q_len": 64, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "chunk under a block": {"q_len": 5, "kv_len": 203},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
    "padded chunk": {"q_len": 41, "kv_len": 205, "batch": 2, "heads": 4, "left_padding": [20, 170]},
    "fewer real tokens than a window": {"q_len": 30, "left_padding": [29]},
    "all padding": {"q_len": 64, "batch": 2, "heads": 2, "left_padding": [64, 3]},
}
DOCUMENTS = {"documents": {"q_len": 150, "documents": [0] * 70 + [1] * 5 + [2] * 75}}
a_seed = st.integers(0, 99)


def proxy(gamma=0.8, **options):
    return sp.get_strategy("proxy_attn", **{"sink": 0, "min_budget": 1, "gamma": gamma, "block_size": 16, **options})


def inputs(left_padding=None, documents=None, scale=6.0, size=16, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], size, left_padding=left_padding, documents=documents)


def highest(q, k, prompt, groups=1, stride=4):
    """The highest probability of the mean heads in each block, among the first tokens of windows: float64."""
    q, k = (x.double().unflatten(1, (groups, -1)).mean(2) for x in (q, k))
    windows = (torch.arange(prompt.q_len) % stride == 0)[:, None] & (torch.arange(prompt.kv_len) % stride == 0)
    p = reference.probabilities(q, k, (reference.token_mask(prompt, len(q)) & windows)[:, None])
    out = torch.zeros(*q.shape[:2], prompt.n_q, prompt.n_k, dtype=torch.float64)
    for i in range(prompt.n_q):
        for j in range(prompt.n_k):
            rows, keys = reference.query_block(prompt, i), reference.key_block(prompt, j)
            out[:, :, i, j] = p[:, :, rows.start : rows.stop, keys.start : keys.stop].amax((2, 3))
    return out


def budgets(q, k, prompt, gamma, least):
    """The fewest blocks that hold the share of the last queries' attention, as a list for each row of the batch."""
    vertical = reference.representative(q, k, prompt)[0]
    return [[max(reference.fewest(mass, gamma), least) for mass in heads] for heads in vertical.tolist()]


def highest_visible(scores, counts, prompt):
    """In each row of each head, as many of the highest visible blocks as the budget of the head, and the own blocks."""
    seen, own = reference.visible(prompt, len(scores)), reference.diagonal(prompt, len(scores))
    heads = len(counts[0])
    keep = torch.zeros(len(scores), heads, prompt.n_q, prompt.n_k, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        row = scores[b, h * scores.shape[1] // heads, i].tolist()
        visible = seen[b, 0, i].nonzero()[:, 0].tolist()
        ranked = sorted(visible, key=lambda j: (-row[j], j))
        keep[b, h, i, ranked[: counts[b][h]]] = True
    return keep | own


# Against plain loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 4, 16])
@pytest.mark.parametrize("sizes", [*PROMPTS.values(), *DOCUMENTS.values()], ids=[*PROMPTS, *DOCUMENTS])
def test_scores_equal_plain_loops(sizes, stride):
    q, k, prompt = inputs(**sizes)
    for groups in {1, k.shape[1]}:
        scores = sp.get_estimator("proxy_heads", groups=groups, stride=stride)(q, k, prompt)
        torch.testing.assert_close(scores.double(), highest(q, k, prompt, groups, stride), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("gamma", "least"), [(0.5, 1), (0.8, 4)])
@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
def test_keeps_the_highest_blocks_of_the_proxy_up_to_the_budget_of_each_head_and_the_own_blocks(sizes, gamma, least):
    q, k, prompt = inputs(**sizes)
    for groups in {1, k.shape[1]}:
        keep = proxy(gamma, groups=groups, min_budget=least * 16).keep(q, k, prompt)
        want = highest_visible(highest(q, k, prompt, groups), budgets(q, k, prompt, gamma, least), prompt)
        assert torch.equal(keep, want & reference.visible(prompt, len(q)))


def test_the_inputs_of_this_file_skip_blocks_and_budgets_differ():
    q, k, prompt = inputs(q_len=300)
    assert (prompt.visible() & ~proxy().keep(q, k, prompt)).any((2, 3)).all()
    assert len(set(budgets(q, k, prompt, 0.8, 1)[0])) > 1


def test_the_first_block_is_kept_by_default():
    q, k, prompt = inputs(q_len=300)
    keep = sp.get_strategy("proxy_attn", block_size=16, gamma=0.5, min_budget=1).keep(q, k)
    assert torch.equal(keep, proxy(0.5).keep(q, k) | prompt.sink_blocks(1))
    assert not proxy(0.5).keep(q, k)[..., 0].all()


# Proxies --------------------------------------------------------------------------------------------------


def test_a_proxy_of_one_head_with_stride_one_scores_as_the_head_itself():
    q, k, prompt = inputs(q_len=129, heads=3, kv_heads=3)
    scores = sp.get_estimator("proxy_heads", groups=3, stride=1)(q, k, prompt)
    p = reference.probabilities(q, k, reference.token_mask(prompt)[:, None])
    blocks = torch.nn.functional.pad(p, (0, 15, 0, 15)).unflatten(3, (9, 16)).unflatten(2, (9, 16))
    torch.testing.assert_close(scores.double(), blocks.amax((3, 5)), rtol=1e-4, atol=1e-7)


@given(tokens=st.sampled_from([1, 63, 129, 250]), seed=a_seed)
def test_a_stride_equals_a_prompt_of_fewer_tokens_in_smaller_blocks(tokens, seed):
    q, k, prompt = inputs(q_len=tokens, seed=seed, size=64)
    strided = sp.get_estimator("proxy_heads", stride=4)(q, k, prompt)
    few = q[:, :, ::4], k[:, :, ::4], sp.Prompt(-(-tokens // 4), block_size=16)
    torch.testing.assert_close(strided, sp.get_estimator("proxy_heads", stride=1)(*few))


@given(factor=st.sampled_from([0.25, 8.0]), groups=st.sampled_from([1, 2]), seed=a_seed)
def test_moving_a_factor_from_the_keys_to_the_queries_changes_nothing(factor, groups, seed):
    q, k, _ = inputs(q_len=200, seed=seed)
    assert torch.equal(proxy(groups=groups).keep(q * factor, k / factor), proxy(groups=groups).keep(q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_thousands_give_finite_probabilities(dtype):
    q, k, prompt = inputs(q_len=200)
    scores = sp.get_estimator("proxy_heads")((q * 1000).to(dtype), k.to(dtype), prompt)
    assert scores.isfinite().all()
    assert (scores.amax(-1) > 0.4).all()
    assert scores.max() <= 1


@pytest.mark.parametrize(("logits", "blocks"), [(1, 8), (2**24, 3), (2**24, 1000)])
@pytest.mark.parametrize("sizes", [*PROMPTS.values(), *DOCUMENTS.values()], ids=[*PROMPTS, *DOCUMENTS])
def test_scores_do_not_depend_on_the_number_of_query_blocks_per_step(sizes, logits, blocks, monkeypatch):
    q, k, prompt = inputs(**sizes)
    before = sp.get_estimator("proxy_heads")(q, k, prompt)
    monkeypatch.setattr(proxy_heads, "MAX_LOGITS_CPU", logits)
    monkeypatch.setattr(proxy_heads, "MAX_QUERY_BLOCKS_CPU", blocks)
    torch.testing.assert_close(sp.get_estimator("proxy_heads")(q, k, prompt), before, rtol=1e-5, atol=1e-7)


def test_logits_in_memory_stay_within_the_limit(monkeypatch):
    counts = []

    def highest(q, k, *rest):
        counts.append(q.shape[1] * q.shape[2] * k.shape[2])
        return original(q, k, *rest)

    original = proxy_heads._highest
    q, k, prompt = inputs(q_len=333)
    monkeypatch.setattr(proxy_heads, "_highest", highest)
    # Three query blocks of 4 windows, by 84 windows of keys, for each of two groups.
    monkeypatch.setattr(proxy_heads, "MAX_LOGITS_CPU", 3 * 2 * 4 * 84)
    sp.get_estimator("proxy_heads", groups=2)(q, k, prompt)
    assert len(counts) == 7
    assert max(counts) <= proxy_heads.MAX_LOGITS_CPU


# Heads and budgets ----------------------------------------------------------------------------------------


@given(seed=a_seed, gamma=st.sampled_from([0.3, 0.6, 0.9]))
def test_tables_of_heads_of_a_group_are_nested_and_equal_if_their_budgets_are(seed, gamma):
    q, k, prompt = inputs(q_len=250, seed=seed)
    (counts,) = budgets(q, k, prompt, gamma, 1)
    keep = proxy(gamma, groups=2).keep(q, k)
    for group in (range(3), range(3, 6)):
        for a in group:
            for b in group:
                if counts[a] <= counts[b]:
                    assert not (keep[:, a] & ~keep[:, b]).any()
    least = proxy(0.01, groups=2, min_budget=48).keep(q, k)  # no head needs more than the minimum budget
    assert torch.equal(least[:, :3], least[:, :1].expand(-1, 3, -1, -1))
    assert torch.equal(least[:, 3:], least[:, 3:4].expand(-1, 3, -1, -1))
    assert not torch.equal(least[:, 0], least[:, 3])


@given(low=st.floats(0.01, 1), high=st.floats(0.01, 1), seed=a_seed)
def test_a_larger_gamma_keeps_a_superset(low, high, seed):
    q, k, _ = inputs(q_len=200, seed=seed)
    low, high = sorted((low, high))
    assert not (proxy(low).keep(q, k) & ~proxy(high).keep(q, k)).any()


@given(tokens=st.sampled_from([40, 63, 129, 200]), seed=a_seed)
def test_a_gamma_of_one_keeps_all_blocks(tokens, seed):
    q, k, prompt = inputs(q_len=tokens, seed=seed)
    assert torch.equal(proxy(1).keep(q, k), prompt.visible().expand(1, 6, -1, -1))


@given(tokens=st.integers(1, 200), least=st.integers(1, 200), seed=a_seed)
def test_each_row_keeps_at_least_the_minimum_budget_or_all_visible_blocks(tokens, least, seed):
    q, k, prompt = inputs(q_len=tokens, seed=seed)
    kept = proxy(0.2, min_budget=least).keep(q, k).sum(-1)
    assert (kept >= prompt.visible().sum(-1).clamp(max=math.ceil(least / 16))).all()


@pytest.mark.parametrize(
    ("tokens", "padding", "blocks"), [(8000, 0, 4), (8208, 0, 5), (40000, 0, 16), (8000, 3000, 3), (150, 0, 1)]
)
def test_the_default_minimum_budget_is_2048_tokens_but_at_most_a_sixteenth_of_the_real_tokens(tokens, padding, blocks):
    strategy = sp.get_strategy("proxy_attn", sink=0)
    prompt = sp.Prompt(q_len=128, kv_len=tokens, left_padding=[padding])
    q, k, _ = reference.random_qkv(heads=2, kv_heads=1, q_len=128, kv_len=tokens, dim=32)
    scores = strategy.score(q, k, prompt)
    one_block = torch.zeros_like(scores.vertical)
    one_block[..., -1] = 1
    keep = strategy.select(scores._replace(vertical=one_block), prompt)
    assert (keep.sum(-1) == blocks).all()


def test_a_budget_is_spent_on_visible_blocks_even_where_probabilities_are_zero():
    q, k, prompt = inputs(q_len=200, left_padding=[48], scale=1000.0)
    assert (sp.get_estimator("proxy_heads", stride=16)(q, k, prompt)[..., -1, 3:] == 0).any()
    kept = proxy(0.01, min_budget=80, stride=16).keep(q, k, prompt).sum(-1)
    assert (kept >= prompt.visible().sum(-1).clamp(max=5)).all()


def test_the_budgets_of_a_chunk_come_from_its_last_queries():
    q, k, prompt = inputs(q_len=192)
    assert not sp.get_strategy("proxy_attn").chunk_invariant
    q[:, :, 160:] = 0  # the last queries attend to all keys equally
    whole = proxy(0.7).keep(q, k)[:, :, :6, :6]
    assert torch.equal(whole, prompt.visible()[:, :, :6, :6].expand(1, 6, -1, -1))
    assert not torch.equal(proxy(0.7).keep(q[:, :, :96], k[:, :, :96]), whole)


# Refused options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0}, "gamma must be"),
        ({"gamma": 1.1}, "gamma must be"),
        ({"groups": 0}, "groups must be a whole number, 1 or more"),
        ({"stride": 3}, "stride must be one of 1, 2, 4, 8, 16"),
        ({"stride": 4.0}, "stride must be a whole number"),
        ({"min_budget": 0}, "min_budget must be a whole number, 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sp.get_strategy("proxy_attn", **options)


def test_groups_that_do_not_divide_the_key_heads_are_refused():
    q, k, _ = inputs(q_len=100, heads=8, kv_heads=4)
    for groups in (3, 8):
        with pytest.raises(ValueError, match=f"groups={groups} doesn't divide the 4 key heads"):
            proxy(groups=groups).keep(q, k)

"""MoBA equals its formulas in plain loops, with the token gate and with the block gate."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.estimators import token_votes

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "a token after whole blocks": {"q_len": 129},
    "300": {"q_len": 300, "heads": 4, "kv_heads": 1},
    "batch, no groups": {"q_len": 100, "batch": 2, "heads": 4, "kv_heads": 4},
    "chunk": {"q_len": 64, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
    "padded chunk": {"q_len": 41, "kv_len": 205, "batch": 2, "heads": 4, "left_padding": [20, 170]},
    "all padding": {"q_len": 64, "batch": 2, "heads": 2, "left_padding": [64, 3]},
}
every_prompt = pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)


def moba(k, gate="block", **guards):
    return sp.get_strategy("moba", k=k, gate=gate, block_size=16, **{"sink": 0, **guards})


def inputs(left_padding=None, scale=1.0, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding)


def highest(products, own, count):
    """``count`` blocks: the own blocks and then the highest products, the earlier of equal ones first."""
    ranked = sorted(products, key=lambda j: (j not in own, -products[j], j))
    return set(ranked[:count]) | set(own)


def token_choices(q, k, prompt, count):
    """The key blocks that each query routes to: bool [B, Hq, M, n_k]."""
    means = reference.block_means(k, prompt, queries=False)
    group, offset = q.shape[1] // k.shape[1], prompt.offset
    out = torch.zeros(*q.shape[:3], prompt.n_k, dtype=torch.bool)
    for b, h, row in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        first, position = reference.padding_of(prompt, b), row + offset
        if position >= first:
            own = position // 16
            products = {j: float(q[b, h, row].double() @ means[b, h // group, j]) for j in range(first // 16, own + 1)}
            out[b, h, row, list(highest(products, {own}, count))] = True
    return out


@pytest.mark.parametrize("count", [1, 3, 100])
@every_prompt
def test_the_token_gate_keeps_each_block_that_a_query_of_the_block_routes_to(sizes, count):
    q, k, prompt = inputs(**sizes)
    tokens = token_choices(q, k, prompt, count)
    assert (tokens.sum(-1) <= count).all()
    slots = torch.nn.functional.pad(tokens, (0, 0, 0, -prompt.q_len % 16)).unflatten(2, (-1, 16))
    assert torch.equal(moba(count, "token").keep(q, k, prompt), slots.any(3))
    real = prompt.real_queries().unflatten(1, (-1, 16)).sum(-1)[:, None, :, None]
    votes = sp.get_estimator("token_votes", k=count)(q, k, prompt)
    torch.testing.assert_close(votes, slots.sum(3) / real.clamp(min=1))


@pytest.mark.parametrize("count", [1, 3, 100])
@every_prompt
def test_the_block_gate_keeps_the_own_blocks_and_the_highest_products_of_means(sizes, count):
    q, k, prompt = inputs(**sizes)
    q_means, k_means = reference.block_means(q, prompt, True), reference.block_means(k, prompt, False)
    seen, own = reference.visible(prompt, len(q)), reference.diagonal(prompt, len(q))
    keep = moba(count).keep(q, k, prompt)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        key_head = h // (q.shape[1] // k.shape[1])
        visible = seen[b, 0, i].nonzero()[:, 0].tolist()
        products = {j: float(q_means[b, h, i] @ k_means[b, key_head, j]) for j in visible}
        want = highest(products, set(own[b, 0, i].nonzero()[:, 0].tolist()), count)
        assert set(keep[b, h, i].nonzero()[:, 0].tolist()) == want


@given(tokens=st.sampled_from([40, 63, 129, 200]), count=st.integers(1, 8), seed=st.integers(0, 99))
@pytest.mark.parametrize("gate", ["block", "token"])
def test_rows_keep_at_least_k_blocks_with_the_own_one_and_all_blocks_if_k_is_their_number(gate, tokens, count, seed):
    q, k, prompt = inputs(q_len=tokens, seed=seed)
    keep = moba(count, gate).keep(q, k, prompt)
    assert (keep | ~prompt.diagonal()).all()
    want = prompt.visible().sum(-1).clamp(max=count).expand_as(keep.sum(-1))
    assert torch.equal(keep.sum(-1), want) if gate == "block" else (keep.sum(-1) >= want).all()
    assert not (keep & ~moba(count + 1, gate).keep(q, k, prompt)).any()
    assert torch.equal(moba(prompt.n_k, gate).keep(q, k, prompt), prompt.visible().expand_as(keep))


@pytest.mark.parametrize("gate", ["block", "token"])
def test_equal_products_route_to_the_earlier_blocks(gate):
    q, k, prompt = inputs(q_len=160)
    keep = moba(3, gate).keep(torch.ones_like(q), torch.ones_like(k), prompt)
    for i in range(10):
        assert set(keep[0, 0, i].nonzero()[:, 0].tolist()) == {0, min(1, i), i}


def test_both_gates_agree_if_the_queries_of_each_block_are_equal():
    q, k, prompt = inputs(q_len=160)
    q = q[:, :, ::16].repeat_interleave(16, dim=2)
    assert torch.equal(moba(3).keep(q, k, prompt), moba(3, "token").keep(q, k, prompt))


@pytest.mark.parametrize("gate", ["block", "token"])
@pytest.mark.parametrize("chunk", [16, 48, 160])
def test_chunks_of_whole_blocks_select_the_rows_of_the_whole_prompt(chunk, gate):
    q, k, _ = inputs(q_len=333)
    strategy = moba(4, gate, sink=20, local=40)
    assert strategy.chunk_invariant
    whole = strategy.keep(q, k)
    for begin in range(0, 333, chunk):
        end = min(begin + chunk, 333)
        part = strategy.keep(q[:, :, begin:end], k[:, :, :end])
        rows = slice(begin // 16, begin // 16 + part.shape[2])
        assert torch.equal(part, whole[:, :, rows, : part.shape[3]])


@pytest.mark.parametrize("logits", [1, 3 * 6 * 16 * 21])
def test_logits_in_memory_stay_within_the_limit(logits, monkeypatch):
    q, k, prompt = inputs(q_len=333)
    estimator, computed = sp.get_estimator("token_votes", k=4), []
    before = estimator(q, k, prompt)

    def token_logits(*args):
        computed.append(found := plain(*args))
        return found

    plain = token_votes.token_logits
    monkeypatch.setattr(token_votes, "token_logits", token_logits)
    monkeypatch.setattr(token_votes, "MAX_LOGITS", logits)
    assert torch.equal(estimator(q, k, prompt), before)
    assert max(x.numel() for x in computed) <= max(logits, 6 * 16 * 21)
    assert len(computed) == (7 if logits > 1 else 21)


def test_options_and_documents_are_checked():
    for options, message in (({"k": 0}, "k must be"), ({"gate": "head"}, "gate must be one of block, token")):
        with pytest.raises(ValueError, match=message):
            sp.get_strategy("moba", **options)
    q, k, _ = inputs(q_len=64)
    prompt = sp.Prompt(64, block_size=16, documents=[0] * 40 + [1] * 24)
    for refused in (moba(3).keep, moba(3, "token").keep, sp.get_estimator("token_votes")):
        with pytest.raises(ValueError, match="cannot make one table for packed documents"):
            refused(q, k, prompt)

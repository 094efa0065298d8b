"""Prompts with large tables run in chunks of rows or groups of heads, with the same result."""

from __future__ import annotations

import pytest
import reference
import torch
from test_parts import LiveBytes
from test_strategies import NAMES, small
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_prefill as sp
from sparse_prefill import attention
from sparse_prefill.core import tensor_checks
from sparse_prefill.kernel import block_sparse, flex
from sparse_prefill.strategy import Strategy

LENGTHS = {"whole": (333, 333), "one token after whole chunks": (321, 321), "one chunk": (205, 300)}
STRATEGIES = {
    "flash_prefill": {},  # selects each chunk separately
    "mean_pool": {"last": 40},
    "last_query": {"sink": 16},  # scores with the end of the prompt
    "a_shape": {"sink": 16, "local": 40},  # one table for all heads
    "mean_correction": {"of": {"name": "mean_pool", "block_size": 16, "min_length": 0}},
}


def strategy_of(name):
    options = {"block_size": 16, "min_length": 0} if name != "mean_correction" else {}
    return sp.get_strategy(name, **options, **STRATEGIES[name])


@pytest.fixture
def small_tables(monkeypatch):
    """Limit tables to about four rows of six heads, and return the list of their sizes."""
    seen = []
    block_tables = block_sparse.block_tables

    def watched(keep, *others):
        batch, heads, rows, _ = keep.shape
        seen.append(batch * heads * (rows - 1))  # the last chunk may have one extra row
        return block_tables(keep, *others)

    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 6 * 21 * 4)
    monkeypatch.setattr(block_sparse, "block_tables", watched)
    return seen


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_chunks_give_the_output_of_the_whole_prompt(name, lengths, small_tables, monkeypatch):
    batch, heads = (2, 4) if name == "mean_correction" else (1, 6)  # as in the tests of mean_correction
    q, k, v = reference.random_qkv(batch, heads, 2, *lengths, scale=4)
    out = sp.sparse_attention(q, k, v, strategy_of(name))
    assert len(small_tables) > 2
    assert max(small_tables) <= block_sparse.MAX_TABLE_ENTRIES // -(-lengths[1] // 16)
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 1 << 27)
    torch.testing.assert_close(out, sp.sparse_attention(q, k, v, strategy_of(name)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "entries"), [("mean_pool", 5), ("last_query", 1)])
def test_strategies_that_select_by_chunk_never_hold_the_whole_table(name, entries, small_tables):
    q, k, v = reference.random_qkv(q_len=333, scale=4)
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, strategy_of(name))
    assert len(calls) == entries
    assert sum(call.q_len for call in calls) == 333
    assert not any(call.dense for call in calls)


# Groups of heads -----------------------------------------------------------------------------------------

Q_LEN, HEADS, KEY_HEADS = 333, 6, 2
HALVES = [(slice(0, 3), slice(0, 1)), (slice(3, 6), slice(1, 2))]
NUMBERED = {
    "minference": {"heads": {h: ["vertical_and_slash", 16 * h, 16, 1.0] for h in range(1, HEADS)}},
    "duo_attention": {"streaming": [True, False], "retrieval": {"name": "last_query", "block_size": 16}},
    "by_head": {"of": small("last_query"), "heads": {1: small("a_shape", local=64), 4: small("minference")}},
    "gqa_union": {"of": small("flex_prefill")},
    "similarity_guard": {"of": small("prism"), "threshold": 0.03},
}
FIXED = {"a_shape", "dense", "dilated", "local", "lserve", "tri_shape", "triangle_mix"}  # the same for all heads
APART = [name for name in NAMES if small(name).for_heads(*HALVES[0]) is not None]


def apart(name):
    if name in NUMBERED:
        blocks = {} if "of" in NUMBERED[name] else {"block_size": 16, "min_length": 0}
        return sp.get_strategy(name, **blocks, **NUMBERED[name])
    return small(name)


@pytest.mark.parametrize("name", sorted({*APART, *NUMBERED}))
def test_a_group_of_heads_selects_the_same_blocks_as_among_all_heads(name):
    q, k, _ = reference.random_qkv(1, HEADS, KEY_HEADS, Q_LEN, scale=4)
    strategy = apart(name)
    whole = strategy.keep(q, k).expand(1, HEADS, -1, -1)
    assert torch.equal(whole[:, :3], whole[:, 3:]) == (name in FIXED)
    for heads, key_heads in HALVES:
        own = strategy.for_heads(heads, key_heads)
        assert torch.equal(own.keep(q[:, heads], k[:, key_heads]).expand(1, 3, -1, -1), whole[:, heads])


@pytest.fixture
def tables(monkeypatch):
    """Number of entries of each keep table that a strategy returns."""
    seen = []
    guarded = Strategy.guarded

    def watched(self, *others):
        keep = guarded(self, *others)
        seen.append(keep.numel())
        return keep

    monkeypatch.setattr(Strategy, "guarded", watched)
    return seen


@pytest.mark.parametrize("name", ["flex_prefill", "last_query", "sample_attention", "prism", *NUMBERED])
def test_no_table_covers_all_heads(name, tables, small_tables):
    q, k, v = reference.random_qkv(1, HEADS, KEY_HEADS, Q_LEN, scale=4)
    out = sp.sparse_attention(q, k, v, apart(name))
    assert max(tables) <= HEADS // KEY_HEADS * 21 * 21  # one group of query heads
    keep, prompt = apart(name).keep(q, k), sp.Prompt(Q_LEN, block_size=16)
    assert keep.sum() < HEADS * prompt.visible().sum()
    want = reference.sparse_attention(q, k, v, keep, prompt)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("key_heads", "parts"), [(8, [4, 4]), (7, [1] * 7), (9, [3, 3, 3])])
def test_parts_have_equal_numbers_of_heads(key_heads, parts, monkeypatch):
    q, k, _ = reference.random_qkv(1, key_heads, key_heads, 64)
    prompt = sp.Prompt(64, block_size=16)
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 6 * 4 * 4)  # six heads fit
    found = attention._head_groups(small("last_query"), sp.AttentionInputs(q=q, k=k, v=k, prompt=prompt))
    assert [part.key_heads.stop - part.key_heads.start for part in found] == parts


def test_strategies_that_combine_heads_get_all_heads(tables, small_tables):
    q, k, v = reference.random_qkv(1, HEADS, KEY_HEADS, Q_LEN, scale=4)
    for name in ("proxy_attn", "reuse_layer"):
        of = {"of": small("flex_prefill")} if name == "reuse_layer" else {"block_size": 16, "min_length": 0}
        strategy = sp.get_strategy(name, **of)
        assert strategy.for_heads(*HALVES[0]) is None
        sp.sparse_attention(q, k, v, strategy)
        assert tables.pop() == HEADS * 21 * 21


def test_a_call_in_parts_has_one_record_of_all_heads(small_tables, monkeypatch):
    q, k, v = reference.random_qkv(1, HEADS, KEY_HEADS, Q_LEN, scale=4)

    def recorded():
        seen = []
        with sp.record(lambda call, tensors, prompt: seen.append(tensors)) as calls:
            sp.sparse_attention(q, k, v, small("flex_prefill"), scale=0.3)
        return calls, seen

    (part,), (seen,) = recorded()
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 1 << 27)
    (whole,), (want,) = recorded()
    assert torch.equal(part.density, whole.density)
    assert set(part.seconds) == set(whole.seconds)
    assert torch.equal(seen.keep, want.keep)
    assert torch.equal(seen.q, want.q)


def test_sinks_and_key_statistics_belong_to_their_heads(small_tables, monkeypatch):
    q, k, v = reference.random_qkv(1, HEADS, KEY_HEADS, Q_LEN, scale=4)
    strategy = sp.get_strategy("gqa_union", of=small("mean_pool"))  # caches means of keys
    options = {"scale": 0.3, "sinks": torch.linspace(-2, 4, HEADS)}

    def in_two_chunks():
        state, parts = sp.KeyState(), []
        for begin, end in ((0, 160), (160, Q_LEN)):
            of_chunk = q[:, :, begin:end], k[:, :, :end], v[:, :, :end]
            parts.append(sp.sparse_attention(*of_chunk, strategy, state=state, **options))
        return torch.cat(parts, dim=2)

    found = in_two_chunks()
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 1 << 27)
    torch.testing.assert_close(found, in_two_chunks(), rtol=0, atol=1e-5)


def test_a_million_tokens_of_32_heads_take_lists_of_half_a_gigabyte():
    prompt = sp.Prompt(1 << 20)
    rows = block_sparse.rows_at_once(prompt, 32)
    chunks = prompt.chunks(rows)
    assert sum(chunk.prompt.q_len for chunk in chunks) == 1 << 20
    widest = max(chunk.prompt.n_q * (chunk.prompt.n_k // 16 + 1) * 16 for chunk in chunks)
    assert 4 * 32 * widest < 0.6e9


@pytest.mark.parametrize("name", ["a_shape", "flex_prefill", "last_query", "mean_pool", "minference", "moba", "prism"])
def test_a_million_tokens_need_scratch_below_half_of_their_tensors(name, monkeypatch):
    peak, tensors = million_tokens(sp.get_strategy(name), monkeypatch)
    assert peak < tensors / 2


@pytest.mark.parametrize("name", ["by_head", "gqa_union", "mean_correction"])
def test_wrappers_need_scratch_below_half_of_the_tensors(name, monkeypatch):
    heads = {"heads": {1: "a_shape"}} if name == "by_head" else {}
    peak, tensors = million_tokens(sp.get_strategy(name, of="flex_prefill", **heads), monkeypatch)
    assert peak < tensors / 2


def million_tokens(strategy, monkeypatch):
    """Peak scratch and tensor bytes of one layer with 32 query heads and 8 key heads of 128 in bf16.

    Runs as on a GPU, with a fake kernel that allocates only its output.
    """
    monkeypatch.setattr(tensor_checks, "_check_has_values", lambda *tensors: None)
    for name in ("compiled", "compiled_with_modifiers"):
        monkeypatch.setattr(flex, name, lambda: lambda q, k, v, *others: torch.empty_like(q))
    with FakeTensorMode():
        q = torch.empty(1, 32, 1 << 20, 128, dtype=torch.bfloat16, device="meta")
        k = torch.empty(1, 8, 1 << 20, 128, dtype=torch.bfloat16, device="meta")
        v = torch.empty_like(k)
        with LiveBytes(q, k, v) as seen:
            out = sp.sparse_attention(q, k, v, strategy)
    return seen.peak - out.nbytes, q.nbytes + k.nbytes + v.nbytes + out.nbytes

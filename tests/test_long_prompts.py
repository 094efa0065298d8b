"""Prompts whose tables are too large are attended in chunks of rows, or some heads at a time, with the same result."""

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

LENGTHS = {"whole": (333, 333), "one token behind whole chunks": (321, 321), "a chunk itself": (205, 300)}
STRATEGIES = {
    "flash_prefill": {},  # selects chunk by chunk
    "mean_pool": {"last": 40},
    "last_query": {"sink": 16},  # looks at the end of the prompt
    "a_shape": {"sink": 16, "local": 40},  # one table for all heads
    "mean_correction": {"of": {"name": "mean_pool", "block_size": 16, "min_length": 0}},
}


def strategy_of(name):
    options = {"block_size": 16, "min_length": 0} if name != "mean_correction" else {}
    return sp.get_strategy(name, **options, **STRATEGIES[name])


@pytest.fixture
def few_at_once(monkeypatch):
    """Sizes of the tables that block lists are made for at once: from here on, about four rows of six heads."""
    seen = []
    block_tables = block_sparse.block_tables

    def watched(keep, *others):
        batch, heads, rows, _ = keep.shape
        seen.append(batch * heads * (rows - 1))  # the last chunk may have one row more
        return block_tables(keep, *others)

    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 6 * 21 * 4)
    monkeypatch.setattr(block_sparse, "block_tables", watched)
    return seen


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_chunks_give_what_the_whole_prompt_gives(name, lengths, few_at_once, monkeypatch):
    batch, heads = (2, 4) if name == "mean_correction" else (1, 6)  # as in its own tests
    q, k, v = reference.random_qkv(batch, heads, 2, *lengths, scale=4)
    out = sp.sparse_attention(q, k, v, strategy_of(name))
    assert len(few_at_once) > 2
    assert max(few_at_once) <= block_sparse.MAX_TABLE_ENTRIES // -(-lengths[1] // 16)
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 1 << 27)
    torch.testing.assert_close(out, sp.sparse_attention(q, k, v, strategy_of(name)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "entries"), [("mean_pool", 5), ("last_query", 1)])
def test_strategies_that_select_by_chunk_never_hold_the_whole_table(name, entries, few_at_once):
    q, k, v = reference.random_qkv(q_len=333, scale=4)
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, strategy_of(name))
    assert len(calls) == entries
    assert sum(call.q_len for call in calls) == 333
    assert not any(call.dense for call in calls)


# Some heads at a time --------------------------------------------------------------------------------------

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
def test_heads_by_themselves_select_what_they_select_among_all(name):
    q, k, _ = reference.random_qkv(1, HEADS, KEY_HEADS, Q_LEN, scale=4)
    strategy = apart(name)
    whole = strategy.keep(q, k).expand(1, HEADS, -1, -1)
    assert torch.equal(whole[:, :3], whole[:, 3:]) == (name in FIXED)
    for heads, key_heads in HALVES:
        own = strategy.for_heads(heads, key_heads)
        assert torch.equal(own.keep(q[:, heads], k[:, key_heads]).expand(1, 3, -1, -1), whole[:, heads])


@pytest.fixture
def tables(monkeypatch):
    """How many entries each keep table of a strategy had."""
    seen = []
    guarded = Strategy.guarded

    def watched(self, *others):
        keep = guarded(self, *others)
        seen.append(keep.numel())
        return keep

    monkeypatch.setattr(Strategy, "guarded", watched)
    return seen


@pytest.mark.parametrize("name", ["flex_prefill", "last_query", "sample_attention", "prism", *NUMBERED])
def test_no_table_of_all_heads_is_made(name, tables, few_at_once):
    q, k, v = reference.random_qkv(1, HEADS, KEY_HEADS, Q_LEN, scale=4)
    out = sp.sparse_attention(q, k, v, apart(name))
    assert max(tables) <= HEADS // KEY_HEADS * 21 * 21  # one key head's
    keep, prompt = apart(name).keep(q, k), sp.Prompt(Q_LEN, block_size=16)
    assert keep.sum() < HEADS * prompt.visible().sum()
    want = reference.sparse_attention(q, k, v, keep, prompt)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("key_heads", "parts"), [(8, [4, 4]), (7, [1] * 7), (9, [3, 3, 3])])
def test_parts_have_one_number_of_heads(key_heads, parts, monkeypatch):
    q, k, _ = reference.random_qkv(1, key_heads, key_heads, 64)
    prompt = sp.Prompt(64, block_size=16)
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 6 * 4 * 4)  # room for six
    found = attention._head_groups(small("last_query"), sp.AttentionInputs(q=q, k=k, v=k, prompt=prompt))
    assert [part.key_heads.stop - part.key_heads.start for part in found] == parts


def test_strategies_that_look_at_all_heads_together_see_them_all(tables, few_at_once):
    q, k, v = reference.random_qkv(1, HEADS, KEY_HEADS, Q_LEN, scale=4)
    for name in ("proxy_attn", "reuse_layer"):
        of = {"of": small("flex_prefill")} if name == "reuse_layer" else {"block_size": 16, "min_length": 0}
        strategy = sp.get_strategy(name, **of)
        assert strategy.for_heads(*HALVES[0]) is None
        sp.sparse_attention(q, k, v, strategy)
        assert tables.pop() == HEADS * 21 * 21


def test_a_record_has_one_entry_of_all_heads(few_at_once, monkeypatch):
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


def test_sinks_and_key_statistics_belong_to_their_heads(few_at_once, monkeypatch):
    q, k, v = reference.random_qkv(1, HEADS, KEY_HEADS, Q_LEN, scale=4)
    strategy = sp.get_strategy("gqa_union", of=small("mean_pool"))  # remembers means of keys
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
def test_a_million_tokens_take_half_of_the_memory_of_their_tensors_besides(name, monkeypatch):
    peak, tensors = million_tokens(sp.get_strategy(name), monkeypatch)
    assert peak < tensors / 2


@pytest.mark.parametrize("name", ["by_head", "gqa_union", "mean_correction"])
def test_wrappers_take_no_more(name, monkeypatch):
    heads = {"heads": {1: "a_shape"}} if name == "by_head" else {}
    peak, tensors = million_tokens(sp.get_strategy(name, of="flex_prefill", **heads), monkeypatch)
    assert peak < tensors / 2


def million_tokens(strategy, monkeypatch):
    """Most bytes that one layer of 32 query heads and 8 key heads of 128 in bf16 holds besides its q, k, v and output.

    As on a GPU, with a kernel that allocates its output alone.
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

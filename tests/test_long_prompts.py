"""Prompts whose tables are too large are attended in chunks of rows, with the same result."""

from __future__ import annotations

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill import kernel

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
    """The most rows that block lists were made for at once, which are about four from here on."""
    seen = []
    block_tables = kernel.block_tables

    def watched(keep, *others):
        seen.append(keep.shape[2])
        return block_tables(keep, *others)

    monkeypatch.setattr(kernel, "TABLE", 6 * 21 * 4)
    monkeypatch.setattr(kernel, "block_tables", watched)
    return seen


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_chunks_give_what_the_whole_prompt_gives(name, lengths, few_at_once, monkeypatch):
    batch, heads = (2, 4) if name == "mean_correction" else (1, 6)  # as in its own tests
    q, k, v = reference.random_qkv(batch, heads, 2, *lengths, scale=4)
    out = sp.sparse_attention(q, k, v, strategy_of(name))
    assert len(few_at_once) > 2
    assert max(few_at_once) <= 6
    monkeypatch.setattr(kernel, "TABLE", 1 << 27)
    torch.testing.assert_close(out, sp.sparse_attention(q, k, v, strategy_of(name)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "entries"), [("mean_pool", 5), ("last_query", 1)])
def test_strategies_that_select_by_chunk_never_hold_the_whole_table(name, entries, few_at_once):
    q, k, v = reference.random_qkv(q_len=333, scale=4)
    with sp.record() as calls:
        sp.sparse_attention(q, k, v, strategy_of(name))
    assert len(calls) == entries
    assert sum(call.q_len for call in calls) == 333
    assert not any(call.dense for call in calls)


def test_a_million_tokens_of_32_heads_take_lists_of_half_a_gigabyte():
    prompt = sp.Prompt(1 << 20)
    rows = kernel.rows_at_once(prompt, 32)
    chunks = prompt.chunks(rows)
    assert sum(chunk.prompt.q_len for chunk in chunks) == 1 << 20
    widest = max(chunk.prompt.n_q * (chunk.prompt.n_k // 16 + 1) * 16 for chunk in chunks)
    assert 4 * 32 * widest < 0.6e9

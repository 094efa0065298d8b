"""Packing of prompts into rows, and unpacking."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.packing import pack

PROMPTS = [[11, 12, 13, 14], [21], [31, 32, 33], [41, 42]]


def prompts_of(lengths: list[int]) -> list[torch.Tensor]:
    """Prompts whose tokens are all different."""
    return list(torch.arange(1, sum(lengths) + 1).split(lengths))


def test_prompts_are_packed_by_first_fit_decreasing():
    packed = pack(PROMPTS, capacity=6, pad_id=9)
    assert packed.tokens.tolist() == [[11, 12, 13, 14, 41, 42], [31, 32, 33, 21, 9, 9]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 1]]
    assert packed.documents.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 4, 4]]
    assert (packed.rows.tolist(), packed.starts.tolist()) == ([0, 1, 1, 0], [0, 3, 0, 4])
    assert packed.lengths.tolist() == [4, 1, 3, 2]
    assert len(packed) == 4


def test_the_default_capacity_is_the_longest_prompt_and_rows_are_cut_to_their_tokens():
    assert pack(PROMPTS).tokens.tolist() == [[11, 12, 13, 14], [31, 32, 33, 21], [41, 42, 0, 0]]
    assert pack(PROMPTS, capacity=100).tokens.shape == (1, 10)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(0, 30))
def test_every_token_is_packed_once_and_unpacked(lengths, room):
    prompts = prompts_of(lengths)
    capacity = max(lengths) + room
    packed = pack(prompts, capacity=capacity)

    assert packed.tokens.shape[1] <= capacity
    assert sorted(packed.tokens[packed.tokens > 0].tolist()) == list(range(1, sum(lengths) + 1))
    assert all(torch.equal(*pair) for pair in zip(packed.unpack(packed.tokens), prompts, strict=True))
    for document, position in zip(packed.unpack(packed.documents), packed.unpack(packed.positions), strict=True):
        assert len(document.unique()) == 1
        assert position.tolist() == list(range(len(position)))
    assert packed.last(packed.tokens).tolist() == [int(prompt[-1]) for prompt in prompts]
    # First fit never leaves two rows that fit into one.
    filled = (packed.tokens > 0).sum(1).sort().values
    assert len(filled) == 1 or filled[0] + filled[1] > capacity


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=8), st.randoms())
def test_rows_do_not_depend_on_the_order_of_the_prompts(prompts, random):
    shuffled = random.sample(prompts, len(prompts))
    assert torch.equal(pack(prompts, capacity=8).tokens, pack(shuffled, capacity=8).tokens)


@pytest.mark.parametrize("side", ["left", "right"])
def test_caches_are_unpacked_into_a_padded_batch(side):
    packed = pack(PROMPTS, capacity=6)
    cache = torch.randn(2, 3, 8, 5)  # longer than the rows
    batch = packed.unpack_cache(cache, side)
    assert batch.shape == (4, 3, 4, 5)
    for p, (row, start, length) in enumerate(zip(packed.rows, packed.starts, packed.lengths, strict=True)):
        real = slice(4 - length, 4) if side == "left" else slice(length)
        assert torch.equal(batch[p, :, real], cache[row, :, start : start + length])
        assert int((batch[p] == 0).all(0).all(-1).sum()) == 4 - length
    assert packed.left_padding.tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"name": "dense"},
        {"name": "flex_prefill", "gamma": 0.4, "tau": 0.0, "min_budget": 16},
        {"name": "xattention", "threshold": 0.5},
        {"name": "last_query", "share": 0.4},
    ],
    ids=lambda options: options["name"],
)
def test_attention_over_packed_rows_equals_attention_over_separate_prompts(options):
    lengths = [200, 37, 90, 71]
    strategy = sp.get_strategy(**options, block_size=16, min_length=0)
    packed = pack(prompts_of(lengths), capacity=210)
    rows, width = packed.tokens.shape
    q, k, v = reference.random_qkv(batch=rows, q_len=width, scale=3)

    with sp.record() as calls:
        out = sp.sparse_attention(q, k, v, strategy, prompt=packed.prompt(16))

    assert rows == 2
    if strategy.name != "dense":
        assert min(float(call.density.min()) for call in calls) < 0.8
    separate = zip(*(packed.unpack(x.transpose(1, 2)) for x in (q, k, v, out)), strict=True)
    for one in separate:
        q1, k1, v1, out1 = (x.transpose(0, 1)[None] for x in one)
        torch.testing.assert_close(out1, sp.sparse_attention(q1, k1, v1, strategy), atol=1e-5, rtol=1e-4)


def test_prompts_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([])
    with pytest.raises(ValueError, match=r"Prompt 1 must be token ids \[1 or more\], got shape \[0\]"):
        pack([[1], []])
    with pytest.raises(ValueError, match=r"Prompt 0 must be token ids .* got shape \[1, 2\]"):
        pack([[[1, 2]]])
    with pytest.raises(ValueError, match=r"dtype torch\.float32"):
        pack([[0.5]])
    with pytest.raises(ValueError, match="has 4 tokens and a row holds 3"):
        pack(PROMPTS, capacity=3)
    with pytest.raises(ValueError, match="capacity must be a whole number, 1 or more"):
        pack(PROMPTS, capacity=0)


def test_tensors_with_other_rows_cannot_be_unpacked():
    packed = pack(PROMPTS)
    with pytest.raises(ValueError, match=r"3 packed rows with 4 tokens in dimension 1, got shape \[3, 3\]"):
        packed.unpack(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"in dimension 2, got shape \[2, 1, 4, 8\]"):
        packed.unpack_cache(torch.zeros(2, 1, 4, 8))
    with pytest.raises(ValueError, match="padding_side must be one of left, right, got 'middle'"):
        packed.unpack_cache(torch.zeros(3, 1, 4, 8), "middle")

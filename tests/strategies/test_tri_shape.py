"""Tri-shape and TriangleMix: sinks, a window and dense last rows, and the strategy of each layer."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.strategy import as_strategy, to_config

SIZES = {"sink": 20, "local": 40, "last": 10}
PROMPTS = {
    "one token": sp.Prompt(1, block_size=16),
    "63": sp.Prompt(63, block_size=16),
    "127": sp.Prompt(127, block_size=16),
    "a token after whole blocks": sp.Prompt(129, block_size=16),
    "chunk": sp.Prompt(64, 208, 16),
    "chunk off the grid": sp.Prompt(41, 205, 16),
    "chunk near the end": sp.Prompt(64, 208, 16, total_len=212),
    "chunk far from the end": sp.Prompt(64, 208, 16, total_len=400),
    "padding": sp.Prompt(150, block_size=16, left_padding=[37, 0]),
    "documents": sp.Prompt(150, block_size=16, documents=[0] * 70 + [1] * 5 + [2] * 75),
}
every_triangle = pytest.mark.parametrize("name", ["tri_shape", "triangle_mix"])


def inputs(prompt, heads=2):
    q, k, _ = reference.random_qkv(prompt.batch, heads, 1, prompt.q_len, prompt.kv_len)
    return q, k


def triangle(prompt, sink, local, last):
    """The table by its formula: bool [B, 1, n_q, n_k]."""
    end = prompt.total_len or prompt.kv_len

    def kept(b, rows, keys):
        positions = range(rows.start + prompt.offset, rows.stop + prompt.offset)
        first = any(
            0 <= key - reference.first_key(prompt, b, key) < sink and key >= reference.padding_of(prompt, b)
            for key in keys
        )
        near = any(position - key < local for position in positions for key in keys)
        return first or near or positions[-1] >= end - last

    table = reference.block_table(prompt, prompt.batch, kept) | reference.diagonal(prompt, prompt.batch)
    return table & reference.visible(prompt, prompt.batch)


@every_triangle
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_keeps_the_first_and_the_nearest_tokens_and_all_blocks_of_the_last_rows(prompt, name):
    keep = sp.get_strategy(name, block_size=16, **SIZES).keep(*inputs(prompt), prompt)
    assert keep.shape[:2] == (prompt.batch, 1)  # one table for all heads
    assert torch.equal(keep, triangle(prompt, **SIZES))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("tri_shape", {"sink": 128, "local": 1024, "last": 100}),
        ("triangle_mix", {"sink": 8, "local": 512, "last": 128}),
    ],
)
def test_default_sizes(name, sizes):
    prompt = sp.Prompt(2001)
    assert torch.equal(sp.get_strategy(name).keep(*inputs(prompt), prompt), triangle(prompt, **sizes))


@every_triangle
def test_without_dense_last_rows_the_table_equals_a_shape(name):
    prompt = PROMPTS["127"]
    keep = sp.get_strategy(name, block_size=16, sink=20, local=40, last=0).keep(*inputs(prompt), prompt)
    assert torch.equal(keep, sp.get_strategy("a_shape", block_size=16, sink=20, local=40).keep(*inputs(prompt), prompt))


@given(chunk=st.sampled_from([16, 48, 160]), last=st.integers(0, 400))
@every_triangle
def test_chunks_with_total_len_select_the_rows_of_the_whole_prompt(name, chunk, last):
    strategy = sp.get_strategy(name, block_size=16, sink=20, local=40, last=last)
    assert strategy.chunk_invariant
    q, k = inputs(sp.Prompt(333, block_size=16))
    whole = strategy.keep(q, k)
    for begin in range(0, 333, chunk):
        end = min(begin + chunk, 333)
        prompt = sp.Prompt(end - begin, end, 16, total_len=333)
        part = strategy.keep(q[:, :, begin:end], k[:, :, :end], prompt)
        rows = slice(begin // 16, begin // 16 + part.shape[2])
        assert torch.equal(part, whole[:, :, rows, : part.shape[3]])
        assert not whole[:, :, rows, part.shape[3] :].any()


# Layers of TriangleMix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_layers_below_the_start_run_the_other_strategy(start):
    mix = sp.get_strategy("triangle_mix", start=start, below="flex_prefill")
    names = [mix.for_layer(sp.Layer(i, 4)).name for i in range(4)]
    assert names == ["flex_prefill"] * min(start, 4) + ["triangle_mix"] * max(4 - start, 0)
    assert [sp.Plan(default=mix).for_layer(sp.Layer(i, 4)).name for i in range(4)] == names


def test_by_default_the_first_16_layers_are_dense():
    mix = sp.get_strategy("triangle_mix")
    assert [mix.for_layer(sp.Layer(i, 32)).name for i in (0, 15, 16, 31)] == ["dense"] * 2 + ["triangle_mix"] * 2


def test_the_strategy_below_is_bound_to_its_layer_too():
    inner = sp.get_strategy("triangle_mix", start=1, below="a_shape")
    mix = sp.get_strategy("triangle_mix", start=3, below=inner)
    names = [mix.for_layer(sp.Layer(i, 4)).name for i in range(4)]
    assert names == ["a_shape", "triangle_mix", "triangle_mix", "triangle_mix"]
    assert mix.for_layer(sp.Layer(1, 4)) == inner
    assert mix.for_layer(sp.Layer(3, 4)) == mix


@pytest.mark.parametrize(
    "below", ["xattention", {"name": "a_shape", "sink": 64}, sp.get_strategy("flex_prefill", gamma=0.9)]
)
def test_the_strategy_below_may_be_a_strategy_a_name_or_a_mapping_and_survives_to_config(below):
    mix = sp.get_strategy("triangle_mix", below=below)
    assert mix.below == as_strategy(below)
    assert as_strategy(to_config(mix)) == mix


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, "start must be a whole number"),
        ({"start": None}, "start must be a whole number"),
        ({"below": "densest"}, "Unknown strategy 'densest'"),
        ({"below": 3}, "a Strategy, a name, or a mapping"),
        ({"last": -1}, "last must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sp.get_strategy("triangle_mix", **options)

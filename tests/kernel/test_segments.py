"""Segments follow the prompt's keys, each from the start of a block."""

from __future__ import annotations

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill.core.logits import Logits
from sparse_prefill.kernel.segments import append_segments, segment_table, sink_segments

PROMPT = sp.Prompt(60, block_size=16)
QKV = reference.random_qkv(q_len=60)


def segment(slots, heads=6, batch=1):
    keep = torch.rand(batch, heads, PROMPT.n_q, slots, generator=torch.Generator().manual_seed(slots)) < 0.5
    return sp.Segment(k=QKV[1][:, :, :slots], v=QKV[2][:, :, :slots], keep=keep)


def test_the_table_of_segments_has_whole_blocks_and_empty_slots_after_each():
    few, many = segment(5, heads=1), segment(20, batch=2)
    table = segment_table([few, many], 16)
    assert table.shape == (2, 6, PROMPT.n_q, 16 + 32)
    assert torch.equal(table[..., :5], few.keep.expand(2, 6, -1, -1))
    assert torch.equal(table[..., 16:36], many.keep)
    assert not table[..., 5:16].any()
    assert not table[..., 36:].any()


def test_keys_of_segments_begin_at_the_positions_of_their_slots():
    one, two = segment(5), segment(20)
    keys = append_segments(QKV[1], [one.k, two.k], 16)
    assert keys.shape[2] == 64 + 16 + 32
    for begin, part in ((0, QKV[1]), (64, one.k), (80, two.k)):
        assert torch.equal(keys[:, :, begin : begin + part.shape[2]], part)
    assert not keys[:, :, 60:64].any()
    assert not keys[:, :, 69:80].any()


@pytest.mark.parametrize("padding", [None, [40]])
def test_sinks_are_one_key_of_zeros_whose_logit_is_its_bias(padding):
    prompt = sp.Prompt(60, block_size=16, left_padding=padding)
    sinks = torch.linspace(-1, 1, 6)
    inputs = sp.AttentionInputs(q=QKV[0], k=QKV[1], v=QKV[2], prompt=prompt, logits=Logits(sinks=sinks))
    (one,) = sink_segments(inputs)
    assert one.k.shape == one.v.shape == (1, 2, 1, 16)
    assert not one.k.any()
    assert not one.v.any()
    assert torch.equal(one.bias, sinks)
    assert one.keep.flatten().tolist() == [True] * 4 if padding is None else [False, False, True, True]


def test_there_is_no_segment_without_sinks():
    assert sink_segments(sp.AttentionInputs(q=QKV[0], k=QKV[1], v=QKV[2], prompt=PROMPT)) == ()

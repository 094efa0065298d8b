"""The token-level rule reads the table of segments after the prompt's keys, and the prompt's rule before them."""

from __future__ import annotations

import pytest
import torch

import sparse_prefill as sp
from sparse_prefill.kernel import segment_rule
from sparse_prefill.kernel.segment_rule import segment_tensors, with_segments
from sparse_prefill.kernel.segments import segment_table

PROMPT = sp.Prompt(60, block_size=16)


def segment(slots, heads=1, batch=1, bias=0.0):
    keep = torch.rand(batch, heads, PROMPT.n_q, slots, generator=torch.Generator().manual_seed(slots)) < 0.5
    x = torch.zeros(batch, 1, slots, 16)
    return sp.Segment(k=x, v=x, keep=keep, bias=bias)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_each_position_after_the_prompt_is_a_slot_of_the_table(batch, heads):
    segments = [segment(5, heads, batch), segment(20, heads, batch)]
    shape = 2, 3, 60, 64 + 48
    at = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
    prompt_rule = PROMPT.mask_mod(batch=2)(*(x[..., :64] for x in at))
    table = segment_table(segments, 16).expand(2, 3, -1, -1).repeat_interleave(16, 2)[:, :, :60]
    rule = with_segments(PROMPT.mask_mod(batch=2), segment_tensors(segments, PROMPT))
    assert torch.equal(rule(*at), torch.cat([prompt_rule, table], dim=-1))


def test_sizes_of_captured_tensors_are_few(monkeypatch):
    monkeypatch.setattr(segment_rule, "MIN_SEGMENT_TABLE", 1 << 10)
    sizes = {segment_tensors([segment(slots)], PROMPT).table.numel() for slots in range(1, 200, 7)}
    assert sizes == {1 << 10, 1 << 11, 1 << 12}


def test_a_tile_may_read_rows_after_the_last_query_block(monkeypatch):
    monkeypatch.setattr(segment_rule, "MIN_SEGMENT_TABLE", 1)
    tensors = segment_tensors([segment(16)], PROMPT)
    last_row_of_tile = 127 >> int(tensors.size_log2)
    assert int(tensors.strides[2]) * last_row_of_tile + 15 < tensors.table.numel()


def test_a_bias_of_each_head_has_one_size_for_up_to_64_heads():
    (_, one), (_, more) = segment_tensors([segment(5, bias=0.5), segment(5, bias=torch.ones(6))], PROMPT).biases
    assert (one.ndim, float(one)) == (0, 0.5)
    assert more.shape == (64,)
    assert more[:6].tolist() == [1.0] * 6

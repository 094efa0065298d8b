"""Tables that are too large are attended in chunks of rows, and a record counts the blocks that are computed."""

from __future__ import annotations

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill.kernel import block_sparse

PROMPT = sp.Prompt(200, block_size=16)
QKV = reference.random_qkv(q_len=200)


@pytest.mark.parametrize("rows", [2, 3, 12])
def test_chunks_of_rows_equal_the_whole_and_keep_their_segments(rows, monkeypatch):
    source = torch.Generator().manual_seed(0)
    keep = (torch.rand(1, 6, PROMPT.n_q, PROMPT.n_k, generator=source) < 0.4) | PROMPT.diagonal()
    keep = keep & PROMPT.visible()
    some = torch.rand(1, 6, PROMPT.n_q, 20, generator=source) < 0.5
    segment = sp.Segment(k=QKV[1][:, :, :20], v=QKV[2][:, :, :20], keep=some, bias=0.5)
    want = sp.block_sparse_attention(*QKV, keep, prompt=PROMPT, segments=[segment])
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", rows * 6 * PROMPT.n_k)
    found = sp.block_sparse_attention(*QKV, keep, prompt=PROMPT, segments=[segment])
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


def test_parts_fit_the_limit_of_a_table(monkeypatch):
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 6 * 13 * 5)
    assert block_sparse.rows_at_once(PROMPT, heads=6) == 5
    assert block_sparse.rows_at_once(PROMPT, heads=600) == 2, "a chunk of one row would be a decode step"
    assert block_sparse.heads_at_once(PROMPT, group=1) == 2
    assert block_sparse.heads_at_once(PROMPT, group=3) == 0


@pytest.mark.parametrize("length", [1, 16, 17])
def test_a_record_counts_blocks_of_segments_that_hold_a_kept_slot(length, monkeypatch):
    counted = []
    monkeypatch.setattr(block_sparse, "attend", lambda inputs, tables, segments: inputs.q)
    monkeypatch.setattr(block_sparse, "recorder", lambda: counts)
    counts = type("Counts", (), {"add_work": lambda self, work: counted.append(work)})()
    keep = torch.zeros(1, 6, PROMPT.n_q, length, dtype=torch.bool)
    keep[:, 0, 3] = True
    segment = sp.Segment(k=QKV[1][:, :, :length], v=QKV[2][:, :, :length], keep=keep)
    sp.block_sparse_attention(*QKV, PROMPT.diagonal(), prompt=PROMPT, segments=[segment])
    assert counted[0][0].tolist() == [PROMPT.n_q + -(-length // 16)] + [PROMPT.n_q] * 5

"""mean_pool equals its formulas in plain loops."""

import pytest
import reference
import torch

import sparse_prefill as sp

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "a token after whole blocks": {"q_len": 129},
    "300": {"q_len": 300, "heads": 4, "kv_heads": 1},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
}


def inputs(left_padding=None, **sizes):
    q, k, _ = reference.random_qkv(scale=30.0, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
def test_keeps_the_fewest_blocks_that_hold_the_share_plus_the_first_and_own_blocks(sizes, share):
    q, k, prompt = inputs(**sizes)
    keep = sp.get_strategy("mean_pool", share=share, block_size=16).keep(q, k, prompt)
    pooled = reference.pooled_attention(q, k, prompt)
    seen, own = reference.visible(prompt, len(q)), reference.diagonal(prompt, len(q))
    for b, h, i in torch.cartesian_prod(*map(torch.arange, pooled.shape[:3])).tolist():
        row, visible = pooled[b, h, i].tolist(), set(seen[b, 0, i].nonzero()[:, 0].tolist())
        want = visible
        if share < 1 and visible:
            forced = {min(visible)} | set(own[b, 0, i].nonzero()[:, 0].tolist())
            want = reference.largest(row, reference.fewest(row, share)) | forced
        assert set(keep[b, h, i].nonzero()[:, 0].tolist()) == want


def test_the_inputs_of_this_file_skip_blocks():
    q, k, prompt = inputs(q_len=300)
    keep = sp.get_strategy("mean_pool", block_size=16).keep(q, k)
    assert (prompt.visible() & ~keep).any((2, 3)).all()


def test_chunks_of_whole_blocks_select_the_rows_of_the_whole_prompt():
    q, k, prompt = inputs(q_len=333)
    strategy = sp.get_strategy("mean_pool", block_size=16)
    whole = strategy.keep(q, k, prompt)
    for begin in range(0, 333, 48):
        end = min(begin + 48, 333)
        part = strategy.keep(q[:, :, begin:end], k[:, :, :end])
        rows = slice(begin // 16, begin // 16 + part.shape[2])
        assert torch.equal(part, whole[:, :, rows, : part.shape[3]])


@pytest.mark.parametrize("share", [0, 1.1, "0.9", True])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="share must be"):
        sp.get_strategy("mean_pool", share=share)

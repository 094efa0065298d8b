"""Dense attention takes SDPA, a mask or the block-sparse kernel, and each computes what the prompt allows."""

from __future__ import annotations

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill.core.logits import Logits
from sparse_prefill.kernel import dense

CASES = {  # prompt, logits, whether the block-sparse kernel computes it
    "whole": (sp.Prompt(100, block_size=16), Logits(), False),
    "decode": (sp.Prompt(1, 100, block_size=16), Logits(), False),
    "padded decode": (sp.Prompt(1, 100, block_size=16, left_padding=[60]), Logits(), False),
    "one block": (sp.Prompt(10, block_size=16), Logits(softcap=5.0), False),
    "chunk": (sp.Prompt(41, 205, block_size=16), Logits(), True),
    "window": (sp.Prompt(100, block_size=16, window=40), Logits(), True),
    "soft cap": (sp.Prompt(100, block_size=16), Logits(softcap=5.0), True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_only_what_sdpa_would_need_a_large_mask_for(name, monkeypatch):
    prompt, logits, by_kernel = CASES[name]
    calls = []
    monkeypatch.setattr(dense, "attend", lambda inputs, tables, segments: calls.append(tables) or inputs.q)
    q, k, v = reference.random_qkv(q_len=prompt.q_len, kv_len=prompt.kv_len)
    dense.dense_attention(q, k, v, prompt=prompt, logits=logits)
    assert len(calls) == by_kernel


def test_the_kernel_is_given_all_visible_blocks(monkeypatch):
    prompt, calls = sp.Prompt(41, 205, block_size=16), []
    monkeypatch.setattr(dense, "attend", lambda inputs, tables, segments: calls.append(tables) or inputs.q)
    q, k, v = reference.random_qkv(q_len=41, kv_len=205)
    dense.dense_attention(q, k, v, prompt=prompt)
    blocks = calls[0].partial_counts + calls[0].full_counts
    assert torch.equal(blocks, prompt.visible().sum(-1).expand(1, 6, -1).int())

"""Prompts of every kind, with queries and keys, for tests of scores per query token."""

from __future__ import annotations

import pytest
import reference

import sparse_prefill as sp

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "127": {"q_len": 127},
    "a token after whole blocks": {"q_len": 129},
    "300": {"q_len": 300, "heads": 4, "kv_heads": 1},
    "batch, no groups": {"q_len": 100, "batch": 2, "heads": 4, "kv_heads": 4},
    "chunk": {"q_len": 64, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "chunk under a block": {"q_len": 5, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
    "padded chunk": {"q_len": 41, "kv_len": 205, "batch": 2, "heads": 4, "left_padding": [20, 170]},
    "no whole block before the queries": {"q_len": 8, "kv_len": 30, "left_padding": [18]},
    "all padding": {"q_len": 64, "batch": 2, "heads": 2, "left_padding": [64, 3]},
    "documents": {"q_len": 150, "documents": [0] * 70 + [1] * 5 + [2] * 75},
}
every_prompt = pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)


def inputs(left_padding=None, documents=None, scale=8.0, size=16, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], size, left_padding=left_padding, documents=documents)

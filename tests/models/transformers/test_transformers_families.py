"""Sparse prefill in model families, compared with each model's own eager attention."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import sparse_prefill as sp
from sparse_prefill.models.transformers import sparse
from tests.models.transformers.small_models import (
    BLOCK,
    CACHES,
    EVERYTHING,
    FAMILIES,
    HALF,
    PADDED,
    TOKENS,
    build,
    generate,
    logits,
)


@pytest.fixture
def under_tables(monkeypatch):
    """Run a model's own eager attention under its own mask and a keep table for each layer."""

    def run(model, tables: list[torch.Tensor]) -> torch.Tensor:
        def attend(module, query, key, value, mask, **kwargs):
            eager = sys.modules[type(module).__module__].eager_attention_forward
            tokens = tables[module.layer_idx].repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
            kept = tokens[:, :, : query.shape[2], : key.shape[2]]
            mask = mask.masked_fill(~kept, torch.finfo(query.dtype).min)
            return eager(module, query, key, value, mask, **kwargs)

        monkeypatch.setitem(AttentionInterface._global_mapping, "under_tables", attend)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "under_tables", eager_mask)
        model.set_attn_implementation("under_tables")
        try:
            return logits(model)
        finally:
            model.set_attn_implementation("eager")

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_attention_equals_the_eager_attention_of_a_family_under_the_same_blocks(family, under_tables):
    model = build(family)
    eager = logits(model)
    with sparse(model, EVERYTHING):
        torch.testing.assert_close(logits(model), eager, atol=2e-3, rtol=1e-3)

    tables = []
    with sparse(model, HALF) as stats, sp.record(lambda call, seen, prompt: tables.append(seen.keep)):
        out = logits(model)
    assert len(tables) == len(stats.layers) == 2
    assert all(layer.density.max() < 1 for layer in stats.layers.values())
    torch.testing.assert_close(out, under_tables(model, tables), atol=2e-3, rtol=1e-3)
    assert (out - eager).abs().max() > 0.1


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("tokens", [TOKENS, PADDED], ids=["one", "left-padded"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "GptOss"])
def test_with_all_blocks_kept_generation_equals_that_of_eager_attention(family, tokens, options):
    model = build(family)
    expected = generate(model, tokens)
    with sparse(model, EVERYTHING) as stats:
        assert torch.equal(generate(model, tokens, **options), expected)
    assert {call.dense for layer in stats.layers.values() for call in layer.calls} <= {None, "one block", "decode"}

"""Refused models and inputs, and attention modules whose layer index comes from their name."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import sparse_prefill as sp
from sparse_prefill.models.transformers import attention, masks, sparse
from tests.models.transformers.small_models import (
    EVERYTHING,
    HALF,
    LENGTH,
    SIZES,
    TOKENS,
    attention_modules,
    build,
    generate,
    logits,
)


def ring(batch, head, row, key):
    return key >= 0


REFUSED = {
    "holes": ({}, {"attention_mask": torch.ones(1, LENGTH).index_fill(1, torch.tensor([60]), 0)}, "holes in row 0"),
    "a 4D mask": (
        {},
        {"attention_mask": torch.ones(1, 1, LENGTH, LENGTH)},
        r"In layer 0 \(flex_prefill\): .*a mask of shape",
    ),
    "both directions": ({"is_causal": False}, {}, "bidirectional_mask_function"),
    "attention weights": ({}, {"output_attentions": True}, "In layer 0.*output_attentions"),
    "no causality": ({}, {"is_causal": False}, "bidirectional_mask_function"),
}


@pytest.mark.parametrize(("config", "kwargs", "message"), REFUSED.values(), ids=REFUSED)
def test_attention_that_causal_blocks_cannot_express_is_refused(config, kwargs, message):
    model = build()
    for name, value in config.items():
        setattr(model.config, name, value)
    with sparse(model, HALF), pytest.raises(ValueError, match=message):
        logits(model, **kwargs)


def test_unsupported_masks_are_refused_by_name_when_a_layer_uses_them():
    config = transformers.LlamaConfig(attn_implementation="sparse_prefill", sliding_window=0)
    inputs = {"config": config, "inputs_embeds": torch.empty(1, 8, 0), "attention_mask": None, "past_key_values": None}
    masking = transformers.masking_utils
    ringed = masking.create_causal_mask(**inputs, or_mask_function=ring)
    blocks = masking.create_causal_mask(**inputs, block_sequence_ids=torch.zeros(1, 8, dtype=torch.int64))
    nothing = masking.create_sliding_window_causal_mask(**inputs)
    layer = attention_modules(build())[0]
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    for mask, name in ((ringed, "ring"), (blocks, "blockwise_overlay"), (nothing, "sliding_window_overlay.* of 0")):
        with pytest.raises(ValueError, match=f"In layer 0 .*masks attention by.*{name}"):
            attention.attend(layer, q, k, k, mask, default=HALF)


def test_shared_attention_has_the_index_of_its_first_layer():
    sizes = SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 4, "attention_head_dim": 32}
    mamba = {"n_mamba_heads": 8, "mamba_d_state": 16, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 32}
    hybrid = {"hybrid_layer_ids": [1], "layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1}
    torch.manual_seed(0)
    config = transformers.Zamba2Config(**sizes, **mamba, **hybrid, adapter_rank=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    expected, generated = logits(model), generate(model)
    with sparse(model, sp.Plan(default=EVERYTHING, layers={0: "a_shape"})) as stats:
        torch.testing.assert_close(logits(model), expected, atol=2e-3, rtol=1e-3)
        assert torch.equal(generate(model), generated)
    assert [(index, layer.strategy) for index, layer in stats.layers.items()] == [(1, "flex_prefill")]
    shared = next(module for module in model.modules() if getattr(module, "layer_idx", 0) == -1)
    with pytest.raises(ValueError, match=r"layer_idx=-1.*sparse\(model"):
        attention.bind_default(shared, HALF)


def test_attention_without_a_layer_index_gets_it_from_its_name():
    sizes = SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 4, "attention_head_dim": 32}
    mamba = {"n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    torch.manual_seed(0)
    config = transformers.ZambaConfig(**sizes, **mamba, layers_block_type=["mamba", "hybrid"] * 2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    expected, generated = logits(model), generate(model)
    with sparse(model, sp.Plan(default=EVERYTHING, layers={3: "a_shape"})) as stats:
        torch.testing.assert_close(logits(model), expected, atol=2e-3, rtol=1e-3)
        assert torch.equal(generate(model), generated)
    assert [(index, layer.strategy) for index, layer in stats.layers.items()] == [(1, "flex_prefill"), (3, "a_shape")]
    module = next(module for module in attention_modules(model) if module.layer_idx is None)
    with pytest.raises(ValueError, match=r"without a layer_idx.*sparse\(model"):
        attention.bind_default(module, HALF)


@pytest.mark.parametrize("family", ["DeepseekV32", "HYV4"])
def test_a_model_whose_attention_reads_the_mask_is_refused_before_it_runs(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(num_hidden_layers=1))
    with (
        pytest.raises(ValueError, match=f"{family}Attention of {family}ForCausalLM reads the attention mask"),
        sparse(model, HALF),
    ):
        raise AssertionError("the block must not begin")


def test_a_mask_that_a_models_code_reads_refuses():
    mask = masks.make_mask(batch_size=1, q_length=7, kv_length=7)
    for read in (lambda: mask[:, 0], lambda: mask.shape, lambda: torch.zeros(1) + mask, lambda: torch.isnan(mask)):
        with pytest.raises(ValueError, match="own code reads the attention mask"):
            read()
    assert not hasattr(mask, "is_nested")


def test_arguments_that_change_attention_are_refused_in_decoding_too():
    layer = attention_modules(build())[0]
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(ValueError, match="attends with indices"):
        attention.attend(layer, q, k, k, None, default=HALF, indices=torch.zeros(1))


def test_training_is_refused():
    model = build(attention_dropout=0.1)
    with sparse(model, HALF):
        with pytest.raises(ValueError, match=r"no_grad"):
            model(TOKENS)
        model.train()
        with pytest.raises(ValueError, match=r"dropout.*eval\(\)"):
            logits(model)
    assert model.training


def without_attention(family: str) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(vocab_size=128, hidden_size=16, state_size=4, num_hidden_layers=2)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("model", "strategy", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "a_shape", "got Linear"),
        (build, "no_such", "Unknown strategy"),
        (build, 3, "A strategy must be"),
        (build, sp.Plan(layers={5: "dense"}), "layer 5, but the model has 2"),
        (lambda: transformers.BloomForCausalLM(transformers.BloomConfig(n_layer=1)), HALF, "attention interface"),
        (lambda: without_attention("Mamba"), HALF, "MambaForCausalLM has no attention layers"),
        (lambda: without_attention("FalconMamba"), HALF, "FalconMambaForCausalLM has no attention layers"),
    ],
    ids=["not a model", "unknown strategy", "a number", "a plan for another model", "Bloom", "Mamba", "FalconMamba"],
)
def test_unsupported_models_and_strategies_are_refused_and_the_model_is_unchanged(model, strategy, message):
    model = model()
    before = getattr(model, "config", None)
    with pytest.raises(ValueError, match=message), sparse(model, strategy):
        raise ValueError("entered")
    assert getattr(model, "config", None) is before

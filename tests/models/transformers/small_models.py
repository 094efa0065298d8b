"""Small random transformers models, the strategies and the inputs of the tests that run them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

import sparse_prefill as sp

LENGTH, NEW, BLOCK, WINDOW = 203, 6, 16, 40
TOKENS = torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(3))
PADDED = torch.cat([TOKENS, F.pad(TOKENS[:, 53:], (53, 0))])  # the padding isn't a multiple of the block size

EVERYTHING = sp.get_strategy("flex_prefill", gamma=1.0, tau=0.0, block_size=BLOCK, min_length=0)
HALF = sp.get_strategy("flex_prefill", gamma=0.3, tau=0.0, min_budget=16, block_size=BLOCK, min_length=0)
SHAPE = sp.get_strategy("a_shape", sink=16, local=16, block_size=BLOCK, min_length=0)

# Attention is sharp enough for a selection to matter. Most families have the same sizes, and so share a kernel.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, **EXPERTS},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, **MIXED},
    "Gemma3Text": {"head_dim": 16, "query_pre_attn_scalar": 20, **MIXED},
    "Phi3": {"sliding_window": None},
    "Granite": {"attention_multiplier": 0.2},
    "SmolLM3": {"no_rope_layer_interval": 2},
    "GptOss": {"head_dim": 16, "num_local_experts": 4, **EXPERTS, **MIXED},
}

CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 64},
    "static in chunks": {"prefill_chunk_size": 64, "cache_implementation": "static"},
}


def build(family: str = "Llama", *, attention: str = "eager", **options) -> transformers.PreTrainedModel:
    """A random decoder."""
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES.get(family, {}), **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


@torch.no_grad()
def logits(model, tokens=TOKENS, **kwargs) -> torch.Tensor:
    return model(tokens, **kwargs).logits


def generate(model, tokens=TOKENS, **kwargs) -> torch.Tensor:
    mask = (tokens != 0).long()
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | kwargs
    return model.generate(tokens, attention_mask=mask, **options)[:, tokens.shape[1] :]


def attention_modules(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]


def assert_untouched(model, implementation: str, config, keys) -> None:
    assert model.config is config
    assert config._attn_implementation == implementation
    assert list(model.state_dict()) == keys
    for module in model.modules():
        assert not hasattr(module, "_sparse_prefill")
        assert not module._forward_pre_hooks

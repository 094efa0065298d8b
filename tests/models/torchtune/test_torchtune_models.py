"""Sparse prefill in models of every text builder of torchtune, compared with torchtune under the same mask."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import pytest
import torch
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params

import sparse_prefill as sp
from sparse_prefill.models.torchtune import generate, generate_packed, prefill, sparsify

FAMILIES = ("llama2", "llama3", "llama3_1", "llama3_2", "llama3_3", "mistral", "gemma", "gemma2", "phi3", "phi4")
FAMILIES += ("qwen2", "qwen2_5")
SIZES = {
    "vocab_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": 256,
    "num_classes": 3,
    "sliding_window_size": 70,  # not a multiple of the block size
    "query_pre_attn_scalar": 20,
    "hidden_capping_value": 2.0,
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "lora_rank": 4,
    "lora_alpha": 8,
}
LENGTH, BLOCK, SINK, LOCAL = 203, 16, 20, 40
TOKENS = torch.randint(1, 128, (1, LENGTH), generator=torch.Generator().manual_seed(3))
DENSE = sp.get_strategy("dense", block_size=BLOCK)
EVERYTHING = sp.get_strategy("a_shape", sink=LENGTH, block_size=BLOCK, min_length=0)
SKIPPING = sp.get_strategy("a_shape", sink=SINK, local=LOCAL, block_size=BLOCK, min_length=0)


def builders() -> dict[str, Callable]:
    """All functions of torchtune that build text decoders."""
    found = {}
    for family in FAMILIES:
        module = importlib.import_module(f"torchtune.models.{family}")
        for name in module.__all__:
            builder = getattr(module, name)
            if not inspect.isclass(builder) and inspect.signature(builder).return_annotation is TransformerDecoder:
                found[name] = builder
    return found


BUILDERS = builders()
COMPONENTS = [name for name, builder in BUILDERS.items() if "embed_dim" in inspect.signature(builder).parameters]
MODELS = [name for name in BUILDERS if name not in COMPONENTS]


def build(name: str, **options) -> TransformerDecoder:
    """A random decoder of few parameters, with attention sharp enough for a mask to matter."""
    # Gemma scales its embeddings by the square root of their width and ties them to the output.
    builder = BUILDERS[name]
    torch.manual_seed(0)
    names = inspect.signature(builder).parameters
    model = builder(**{key: value for key, value in (SIZES | options).items() if key in names}).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "tok_embeddings" in key:
                parameter.mul_(0.04 if "gemma" in name else 0.3)
            elif "lora_b" in key:
                parameter.normal_(std=0.02)
            elif key.endswith(("q_proj.weight", "k_proj.weight")) and "quantize_base" not in options:
                parameter.mul_(3)
    return model


def kept_by_skipping(length: int) -> torch.Tensor:
    """The strategy's rule written out for tokens: bool [1, length, length]."""
    token = torch.arange(length)
    first = token // BLOCK * BLOCK  # first token of the token's block
    near = first[:, None] - (first + BLOCK - 1) < LOCAL
    return (((first < SINK) | near) & (token[:, None] >= token))[None]


def test_all_builders_are_found():
    assert set(COMPONENTS) >= {"llama2", "lora_llama3_1", "mistral_classifier", "gemma", "lora_gemma2", "phi3", "qwen2"}
    assert set(MODELS) >= {"llama3_3_70b", "qlora_phi4_14b", "gemma2_27b", "lora_qwen2_5_72b_base", "phi3_mini"}
    assert len(BUILDERS) > 100


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_small_model_of_each_builder_equals_torchtune_under_the_same_mask(name):
    model = build(name)
    with torch.no_grad():
        dense, sparse = model(TOKENS)[:, -1:], model(TOKENS, mask=kept_by_skipping(LENGTH))[:, -1:]
    assert (sparse - dense).abs().max() > 1e-3

    torch.testing.assert_close(prefill(sparsify(model, EVERYTHING), TOKENS), dense, atol=2e-4, rtol=1e-4)
    with sp.record() as calls:
        found = prefill(sparsify(model, SKIPPING), TOKENS)
    torch.testing.assert_close(found, sparse, atol=2e-4, rtol=1e-4)
    assert all(call.dense is None and call.density.max() < 0.9 for call in calls)


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("qlora")])
def test_a_model_of_full_size_keeps_its_parameters(name):
    builder = BUILDERS[name]
    with torch.device("meta"):
        model = builder(["q_proj", "v_proj"]) if "lora" in name else builder()
    before, adapters = set(model.state_dict()), set(get_adapter_params(model))
    sparse = sparsify(model, "prism")  # prism needs the rotary embedding
    assert set(sparse.state_dict()) == before
    assert set(get_adapter_params(sparse)) == adapters
    assert bool(adapters) == ("lora" in name)


def test_a_quantized_model_equals_torchtune():
    model = build("lora_llama3_2", embed_dim=256, intermediate_dim=256, quantize_base=True)
    with torch.no_grad():
        for layer in model.layers:
            layer.sa_norm.scale.mul_(3)
        sparse = model(TOKENS, mask=kept_by_skipping(LENGTH))[:, -1:]
        assert (sparse - model(TOKENS)[:, -1:]).abs().max() > 1e-3
    torch.testing.assert_close(prefill(sparsify(model, SKIPPING), TOKENS), sparse, atol=2e-4, rtol=1e-4)


class TestGemma2:
    """Soft cap, scale and windows, with caches: torchtune's own decoding masks the wrong end of a window."""

    def generate_uncached(self, model: TransformerDecoder, tokens: torch.Tensor, new: int) -> list[int]:
        """Greedy tokens by torchtune without a cache."""
        for _ in range(new):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
        return tokens[0, -new:].tolist()

    def test_generation_equals_that_of_torchtune_without_caches(self):
        model = build("gemma2")
        expected = self.generate_uncached(model, TOKENS, 6)
        assert len(set(expected)) > 2
        model = sparsify(model, DENSE)
        assert generate(model, TOKENS, max_new_tokens=6).tokens[0].tolist() == expected
        assert generate(model, TOKENS, max_new_tokens=6, prefill_chunk_size=50).tokens[0].tolist() == expected

    def test_packed_prompts_give_the_tokens_of_separate_calls(self):
        model = sparsify(build("gemma2"), SKIPPING)
        prompts = [TOKENS[0, 50:], TOKENS[0]]
        together = generate_packed(model, prompts, max_new_tokens=6)
        for row, prompt in zip(together.tokens, prompts, strict=True):
            assert torch.equal(row, generate(model, prompt[None], max_new_tokens=6).tokens[0])

    def test_window_soft_cap_and_scale_change_the_result(self):
        plain = prefill(sparsify(build("gemma2"), DENSE), TOKENS)
        for changed in ({"sliding_window_size": 60}, {"hidden_capping_value": 50.0}, {"query_pre_attn_scalar": 16}):
            assert (prefill(sparsify(build("gemma2", **changed), DENSE), TOKENS) - plain).abs().max() > 1e-3

    def test_a_model_can_be_sparsified_again_and_takes_torchtune_masks(self):
        model = build("gemma2")
        with torch.no_grad():
            dense = model(TOKENS)[:, -1:]
            again = sparsify(sparsify(model, SKIPPING), DENSE)
            torch.testing.assert_close(again(TOKENS), dense)
        torch.testing.assert_close(prefill(again, TOKENS), dense, atol=2e-4, rtol=1e-4)

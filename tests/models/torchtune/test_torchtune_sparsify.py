"""``sparsify`` keeps parameters, adapters and caches, gives each layer its strategy, and refuses other models."""

from __future__ import annotations

import pytest
import torch
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.qwen2 import qwen2
from torchtune.modules import MultiHeadAttention, TransformerDecoder
from torchtune.modules.peft import get_adapter_params

import sparse_prefill as sp
from sparse_prefill.models.torchtune import (
    LastTokenDecoder,
    generate,
    prefill,
    score,
    sparsify,
)
from tests.models.torchtune.small_decoders import (
    DENSE,
    EVERYTHING,
    HALF,
    LENGTH,
    LLAMA,
    LORA,
    NEW,
    SIZES,
    TOKENS,
    build,
    stock,
)


def test_sparsify_keeps_names_values_and_adapters():
    model = build(lora_llama3_2, **LLAMA, **LORA)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = set(get_adapter_params(model))

    sparse = sparsify(model, HALF)

    assert list(sparse.state_dict()) == list(before)
    assert set(get_adapter_params(sparse)) == adapters
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())
    assert isinstance(sparse.layers[0].attn, MultiHeadAttention)
    assert not any(module.training for module in sparse.modules())
    sparse.load_state_dict(build(lora_llama3_2, **LLAMA, **LORA).state_dict())


def test_sparsify_again_replaces_the_strategy():
    model = sparsify(sparsify(build(), HALF), EVERYTHING)
    generated = generate(model, TOKENS, max_new_tokens=NEW)
    assert torch.equal(generated.tokens, stock(build())[0])


def test_sparsify_takes_a_name_and_keeps_caches():
    model = build()
    model.setup_caches(1, torch.float32, decoder_max_seq_len=LENGTH)
    sparse = sparsify(model, "a_shape")
    assert sparse.layers[1].attn.strategy == sp.get_strategy("a_shape")
    assert sparse.caches_are_enabled()
    assert sparse.decoder_max_cache_seq_len == LENGTH


def test_other_masks_run_the_dense_attention_of_torchtune():
    model = build()
    sparse = sparsify(model, HALF)
    with torch.no_grad(), sp.record() as calls:
        torch.testing.assert_close(sparse(TOKENS), build()(TOKENS)[:, -1:])
    assert calls == []


class OtherAttention(MultiHeadAttention):
    """An unsupported attention class."""


def with_other_attention(model: TransformerDecoder) -> TransformerDecoder:
    model.layers[1].attn.__class__ = OtherAttention
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: with_other_attention(build()), "Layer 1 attends with OtherAttention"),
        (lambda: torch.nn.Linear(2, 2), "takes a torchtune TransformerDecoder, got Linear"),
    ],
    ids=["attention", "linear"],
)
def test_unsupported_models_and_attention_are_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        sparsify(model(), HALF)


def test_a_refused_model_is_unchanged():
    model = build()
    model.layers[1].attn.is_causal = False
    with pytest.raises(ValueError, match="attention of layer 1 isn't causal"):
        sparsify(model, HALF)
    assert type(model.layers[0].attn) is MultiHeadAttention


def test_bad_arguments_are_refused():
    model = sparsify(build(), HALF)
    with pytest.raises(ValueError, match="got int"):
        sparsify(model, 3)
    with pytest.raises(ValueError, match="Unknown strategy 'nothing'"):
        sparsify(model, "nothing")
    with pytest.raises(ValueError, match=r"sparsify\(\) first"):
        prefill(build(), TOKENS)
    with pytest.raises(ValueError, match=r"whole numbers \[batch, tokens\]"):
        generate(model, TOKENS[0], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens must be"):
        generate(model, TOKENS, max_new_tokens=0)
    with pytest.raises(ValueError, match="don't fit into the model's 256"):
        generate(model, TOKENS, max_new_tokens=54)
    with pytest.raises(ValueError, match="takes 256 tokens, got 257"):
        prefill(model, torch.ones(1, 257, dtype=torch.int64))
    with pytest.raises(ValueError, match="leave each row a token"):
        generate(model, TOKENS, max_new_tokens=1, left_padding=[LENGTH])
    with pytest.raises(ValueError, match="answer must be token ids"):
        score(model, TOKENS, TOKENS[:, :0])
    with torch.inference_mode():
        with pytest.raises(ValueError, match="batch of 3"):
            model(TOKENS, mask=sp.Prompt(q_len=LENGTH, block_size=16, left_padding=[0, 1, 2]))
        with pytest.raises(ValueError, match="pass x as y"):
            model.layers[0].attn(torch.zeros(1, LENGTH, 64), mask=sp.Prompt(q_len=LENGTH, block_size=16))


def test_layers_may_have_different_strategies_and_block_sizes():
    coarse = sp.get_strategy("a_shape", sink=32, local=32, block_size=32, min_length=0)
    model = sparsify(build(), sp.Plan(default=HALF, layers={1: coarse}))
    with sp.record() as calls:
        mixed = prefill(model, TOKENS)
    assert [call.strategy for call in calls] == ["flex_prefill", "a_shape"]
    for strategy in (HALF, coarse):
        assert (prefill(sparsify(build(), strategy), TOKENS) - mixed).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("builder", "layout"),
    [(llama3_2, "interleaved"), (mistral, "interleaved"), (qwen2, "half_split")],
)
def test_a_strategy_receives_its_layer_and_rotary_embedding(builder, layout):
    layers = []

    class LayerRecorder(type(DENSE)):
        def for_layer(self, layer):
            layers.append(layer)
            return self

    model = builder(**SIZES)
    sparsify(model, LayerRecorder())
    assert [(layer.index, layer.count, layer.rope.layout) for layer in layers] == [(0, 2, layout), (1, 2, layout)]
    embedding, x = model.layers[0].attn.pos_embeddings, torch.randn(1, 4, 20, 16)
    want = embedding(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(layers[0].rope.rotate(x, torch.arange(20)), want)
    with torch.device("meta"):  # as recipes build large models
        sparsify(builder(**SIZES), LayerRecorder())
    assert layers[2].rope == layers[0].rope


def test_the_decoder_is_a_torchtune_decoder():
    model = sparsify(build(), HALF)
    assert type(model) is LastTokenDecoder
    assert isinstance(model, TransformerDecoder)

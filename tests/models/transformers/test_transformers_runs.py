"""Compiled, multimodal, mixed-precision and loaded models run sparse prefill."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

import sparse_prefill as sp
from sparse_prefill.models.transformers import register, sparse
from tests.models.transformers.small_models import (
    EVERYTHING,
    FAMILIES,
    HALF,
    NEW,
    PADDED,
    SHAPE,
    SIZES,
    TOKENS,
    assert_untouched,
    build,
    generate,
    logits,
)


def test_a_compiled_model_gives_the_logits_and_tokens_of_an_uncompiled_one():
    model = build()
    eager = logits(model)
    with sparse(model, HALF):
        expected, generated = logits(model), generate(model)
    compiled = torch.compile(model, backend="eager")
    with sparse(compiled, HALF) as stats:
        torch.testing.assert_close(logits(compiled), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(generate(compiled), generated)
    assert stats.density < 1
    torch.testing.assert_close(logits(compiled), eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_decoding_compiles_to_one_graph(family):
    model = build(family)
    expected = generate(model)
    compilation = transformers.CompileConfig(fullgraph=True, mode="default", backend="eager")
    compilation._compile_all_devices = True
    with sparse(model, EVERYTHING):
        assert torch.equal(generate(model, cache_implementation="static", compile_config=compilation), expected)


def test_prompts_of_a_model_compiled_to_one_graph_are_refused():
    model = torch.compile(build("Granite"), backend="eager", fullgraph=True)
    with sparse(model, HALF), pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True"):
        logits(model)


def test_the_text_part_of_a_multimodal_model_is_sparse():
    text = transformers.Gemma3TextConfig(**SIZES, **FAMILIES["Gemma3Text"])
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=125,
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    before, parts = model.config, (model.config.text_config, model.config.vision_config)
    tokens = TOKENS.clamp(max=120)
    eager = logits(model, tokens)
    with sparse(model, HALF) as stats:
        assert (logits(model, tokens) - eager).abs().max() > 0.1
        image = tokens.clone()
        image[:, 50:54] = 125
        types = (image == 125).long()
        with pytest.raises(ValueError, match="blockwise_overlay"):
            logits(model, image, pixel_values=torch.zeros(1, 3, 28, 28), token_type_ids=types)
    assert stats.density < 1
    assert model.config is before
    assert (model.config.text_config, model.config.vision_config) == parts
    assert torch.equal(logits(model, tokens), eager)


@pytest.mark.parametrize("use_cache", [True, False])
def test_mixed_precision_runs_close_to_dense_attention(use_cache):
    model = build(attention="sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        expected, generated = logits(model, use_cache=use_cache), generate(model)
        for strategy in (EVERYTHING, HALF):
            with sparse(model, strategy) as stats:
                out = logits(model, use_cache=use_cache)
                tokens = generate(model)
                assert torch.equal(generate(model, prompt_lookup_num_tokens=3), tokens)
            if strategy is EVERYTHING:
                torch.testing.assert_close(out, expected, atol=0.3, rtol=0.1)
                assert generated.shape == tokens.shape
            else:
                assert stats.density < 1
                assert out.isfinite().all()


def test_inference_mode_gives_the_logits_of_no_grad():
    model = build()
    with sparse(model, SHAPE):
        expected = logits(model)
        with torch.inference_mode():
            assert torch.equal(model(TOKENS).logits, expected)


def test_pipelines_run_sparse_prefill():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="left"
    )
    model = build()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = [" ".join(f"w{i}" for i in row[row != 0].tolist()) for row in PADDED]
    with sparse(pipe.model, EVERYTHING) as stats:
        generated = pipe(
            texts, max_new_tokens=NEW, do_sample=False, batch_size=2, return_full_text=False, eos_token_id=-1
        )
    expected = tokenizer.batch_decode(generate(model, PADDED), skip_special_tokens=True)
    assert [one[0]["generated_text"].strip() for one in generated] == expected
    assert [len(layer.calls) for layer in stats.layers.values()] == [2, 2]


def test_models_loaded_with_the_sparse_prefill_implementation_are_sparse(tmp_path, monkeypatch):
    for registry in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(registry, "_global_mapping", dict(registry._global_mapping))
    model = build()
    with sparse(model, HALF):
        expected = logits(model)
    model.save_pretrained(tmp_path)

    register(HALF)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse_prefill")
    torch.testing.assert_close(logits(loaded), expected)
    with sparse(loaded, EVERYTHING) as stats:
        torch.testing.assert_close(logits(loaded), logits(model), atol=2e-3, rtol=1e-3)
    assert stats.density == 1
    torch.testing.assert_close(logits(loaded), expected)

    torch.testing.assert_close(logits(copy.deepcopy(loaded)), expected)
    loaded.set_attn_implementation("eager")
    assert torch.equal(logits(loaded), logits(model))
    assert_untouched(loaded, "eager", loaded.config, list(model.state_dict()))

    model.config.sparse_prefill = sp.strategy.to_config(HALF)
    model.save_pretrained(tmp_path)
    register("dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sparse_prefill")
    torch.testing.assert_close(logits(loaded), expected)

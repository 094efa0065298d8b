"""Padded, packed, chunked and speculated prompts, compared with the same prompts in separate calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import sparse_prefill as sp
from sparse_prefill.models.transformers import attention, masks, sparse, speculation
from tests.models.transformers.small_models import (
    BLOCK,
    CACHES,
    EVERYTHING,
    HALF,
    LENGTH,
    NEW,
    PADDED,
    TOKENS,
    attention_modules,
    build,
    generate,
    logits,
)


def test_a_left_padded_row_equals_its_unpadded_prompt():
    model = build("Mistral")
    mask = (PADDED != 0).long()
    with sparse(model, HALF):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        together = logits(model, PADDED, attention_mask=mask, position_ids=positions)
        for row, start in enumerate((0, 53)):
            separate = logits(model, PADDED[row : row + 1, start:])
            torch.testing.assert_close(together[row : row + 1, start:], separate, atol=1e-4, rtol=1e-4)


def test_a_right_padded_row_equals_its_unpadded_prompt():
    model = build()
    tokens = torch.cat([TOKENS, F.pad(TOKENS[:, :150], (0, 53))])
    with sparse(model, HALF):
        together = logits(model, tokens, attention_mask=(tokens != 0).long())
        for row, end in enumerate((LENGTH, 150)):
            separate = logits(model, tokens[row : row + 1, :end])
            torch.testing.assert_close(together[row : row + 1, :end], separate, atol=1e-4, rtol=1e-4)


def test_packed_sequences_are_separate_prompts():
    model = build("Qwen2")
    lengths = (90, 70, LENGTH - 160)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with sparse(model, HALF):
        together = logits(model, position_ids=positions, use_cache=False)
        parts = [logits(model, part) for part in TOKENS.split(lengths, 1)]
    torch.testing.assert_close(together, torch.cat(parts, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("given", [{"q_length": 7, "q_offset": 5}, {"cache_position": torch.arange(5, 12)}])
def test_the_mask_function_takes_lengths_in_both_forms_of_transformers_5(given):
    mask = masks.make_mask(batch_size=1, kv_length=20, kv_offset=2, **given)
    assert (mask.prompt.q_len, mask.prompt.kv_len, mask.slots) == (7, 10, 20)


@pytest.mark.parametrize("size", [48, 64])
def test_first_chunks_may_be_all_padding(size):
    model = build("Mistral")
    tokens = torch.cat([TOKENS, F.pad(TOKENS[:, 120:], (120, 0))])
    expected = generate(model, tokens)
    with sparse(model, EVERYTHING):
        assert torch.equal(generate(model, tokens, prefill_chunk_size=size), expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}], ids=str)
def test_other_ways_to_generate_give_the_tokens_of_eager_attention(options):
    model = build()
    expected = generate(model, **options)
    with sparse(model, EVERYTHING):
        assert torch.equal(generate(model, **options), expected)


CHUNKS = {"attention_chunk_size": 48, "num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 16}


@pytest.mark.parametrize(
    ("tokens", "options"),
    [(tokens, options) for tokens in (TOKENS, PADDED) for options in CACHES.values()]
    + [(TOKENS, {"prompt_lookup_num_tokens": 3})],  # transformers supports prompt lookup only for batches of one
)
def test_chunks_of_attention_are_separate_prompts(tokens, options):
    types = ["chunked_attention", "full_attention"]
    model = build("Llama4Text", **CHUNKS, layer_types=types, no_rope_layers=[1, 0])
    mask = (tokens != 0).long()
    expected = generate(model, tokens), logits(model, tokens, attention_mask=mask)
    with sparse(model, EVERYTHING) as stats:
        sparse_logits = logits(model, tokens, attention_mask=mask)
        assert [len(layer.calls) for layer in stats.layers.values()] == ([5, 1] if len(tokens) == 1 else [9 + 2, 2])
        assert torch.equal(generate(model, tokens, **options), expected[0])
    torch.testing.assert_close(sparse_logits[mask.bool()], expected[1][mask.bool()], atol=2e-3, rtol=1e-3)


def test_right_padding_does_not_change_what_a_chunk_of_attention_selects():
    model = build("Llama4Text", **CHUNKS, layer_types=["chunked_attention"] * 2)
    padded = F.pad(TOKENS[:, :150], (0, 53))
    with sparse(model, HALF):
        together = logits(model, padded, attention_mask=(padded != 0).long())
        torch.testing.assert_close(together[:, :150], logits(model, TOKENS[:, :150]), atol=1e-4, rtol=1e-4)


SPECULATION = [{"prompt_lookup_num_tokens": 5}, {"prompt_lookup_num_tokens": 40}, {"assistant_model": True}]


@pytest.mark.parametrize("options", SPECULATION, ids=str)
@pytest.mark.parametrize("name", ["a_shape", "flex_prefill", "mean_slash", "xattention"])
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_speculative_decoding_gives_the_same_tokens(family, name, options):
    strategy = sp.get_strategy(name, block_size=BLOCK, min_length=0)
    for seed in range(3):
        model, assistant = build(family), build(family)
        tokens = torch.randint(3, 20, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():  # so that only some drafts are right
            for parameter in assistant.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
        given = {"assistant_model": assistant} if "assistant_model" in options else options
        with sparse(model, strategy) as stats:
            expected = generate(model, tokens, max_new_tokens=24)
            calls = [layer.calls.copy() for layer in stats.layers.values()]
            assert torch.equal(generate(model, tokens, max_new_tokens=24, **given), expected)
        for layer, before in zip(stats.layers.values(), calls, strict=True):  # statistics don't count guesses
            again = layer.calls[len(before) :]
            assert [(call.q_len, call.kv_len, call.density.tolist()) for call in again] == [
                (call.q_len, call.kv_len, call.density.tolist()) for call in before
            ]


def test_a_release_of_transformers_that_hides_the_number_of_guesses_is_refused(monkeypatch):
    class Model(torch.nn.Module):
        def forward(self):
            return speculation.num_guessed_tokens()

    def known(model):
        candidate_length = 3
        return model(), candidate_length

    def renamed(model):
        num_candidates = 3
        return model(), num_candidates

    assert Model()() == 0
    monkeypatch.setattr(speculation, "ASSISTED_DECODING", known.__code__)
    assert known(Model()) == (3, 3)
    monkeypatch.setattr(speculation, "ASSISTED_DECODING", renamed.__code__)
    with pytest.raises(RuntimeError, match=r"no variable 'candidate_length'.*generate without speculation"):
        renamed(Model())


def test_a_few_tokens_after_a_cache_are_decoding_and_leave_the_key_state_unchanged():
    model = build()
    with sparse(model, HALF) as stats, torch.no_grad():
        binding = attention_modules(model)[0]._sparse_prefill
        cache = model(TOKENS[:, :150]).past_key_values
        known, few = binding.states[cache], TOKENS[:, 150:155]
        several = model(few, past_key_values=cache).logits
        assert binding.states[cache] is known
        assert not binding.caches
        cache.crop(-5)
        single = [model(few[:, i : i + 1], past_key_values=cache).logits for i in range(5)]
    torch.testing.assert_close(several, torch.cat(single, 1), atol=1e-4, rtol=1e-4)
    assert [len(layer.calls) for layer in stats.layers.values()] == [1, 1]
    off = sp.get_strategy("a_shape", sink=16, local=16, block_size=BLOCK, min_length=0, max_decode_queries=0)
    with sparse(model, off) as stats, torch.no_grad():
        cache.crop(-5)
        model(few, past_key_values=cache)
    assert stats.density < 1


def test_a_conversation_may_continue_in_its_cache():
    model = build("Mistral")

    def turns() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        options = {"past_key_values": cache, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        conversation = torch.cat([model.generate(TOKENS, **options), TOKENS[:, :60]], 1)
        return model.generate(conversation, **options)

    expected = turns()
    with sparse(model, EVERYTHING) as stats:
        assert torch.equal(turns(), expected)
    assert len({call.q_len for call in stats.layers[0].calls}) == 2


def test_chunks_select_the_same_blocks_with_and_without_a_continued_key_state(monkeypatch):
    model = build()

    def in_chunks() -> torch.Tensor:
        cache, parts = DynamicCache(config=model.config), []
        for part in TOKENS.split(48, 1):
            parts.append(logits(model, part, past_key_values=cache))
        return torch.cat(parts, 1)

    strategy = sp.get_strategy("mean_pool", share=0.5, block_size=BLOCK, min_length=0)
    with sparse(model, strategy) as stats:
        binding = attention_modules(model)[0]._sparse_prefill
        continued = in_chunks()
        assert len(binding.states) == 0  # freed with the cache
        monkeypatch.setattr(attention, "continued_key_state", lambda *args: None)
        assert torch.equal(in_chunks(), continued)
    assert stats.density < 1


def test_a_key_state_belongs_to_one_cache_and_its_tokens():
    model = build()
    part = TOKENS[:, :48]
    with sparse(model, HALF), torch.no_grad():
        binding = attention_modules(model)[1]._sparse_prefill
        one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for cache in (one, other):
            model(part, past_key_values=cache)
        first = binding.states[one].state
        assert binding.states[other].state is not first
        model(part, past_key_values=one)
        assert binding.states[one].state is first  # continued
        one.crop(-8)
        for token in TOKENS[0, :8]:  # other last tokens, of the same length
            model(token.view(1, 1), past_key_values=one)
        model(part, past_key_values=one)
        assert binding.states[one].state is not first


def test_a_single_query_runs_sdpa_only(monkeypatch):
    model = build()
    with sparse(model, HALF), torch.no_grad():
        cache = model(TOKENS).past_key_values
        want = model(TOKENS, past_key_values=None).logits[:, -1]
        monkeypatch.setattr(masks, "_prompt_mask", None)
        for name in ("sparse_attention", "_prefill", "attend_rows"):
            monkeypatch.setattr(attention, name, None)
        cache.crop(-1)
        got = model(TOKENS[:, -1:], past_key_values=cache).logits[:, -1]
    with torch.no_grad():
        cache.crop(-1)
        stock = model(TOKENS[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, stock, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, want, atol=1e-3)  # decoding reads the whole cache

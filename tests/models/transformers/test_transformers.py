"""Sparse prefill in transformers models, compared with each model's own eager attention."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import eager_mask

import sparse_prefill as sp
from sparse_prefill.models.transformers import attention, masks, register, sparse, speculation
from sparse_prefill.models.transformers.stats import Stats

LENGTH, NEW, BLOCK, WINDOW = 203, 6, 16, 40
TOKENS = torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(3))
PADDED = torch.cat([TOKENS, F.pad(TOKENS[:, 53:], (53, 0))])  # by no multiple of the block

EVERYTHING = sp.get_strategy("flex_prefill", gamma=1.0, tau=0.0, block_size=BLOCK, min_length=0)
HALF = sp.get_strategy("flex_prefill", gamma=0.3, tau=0.0, min_budget=16, block_size=BLOCK, min_length=0)
SHAPE = sp.get_strategy("a_shape", sink=16, local=16, block_size=BLOCK, min_length=0)

# Attention sharp enough for a selection to matter; one kernel for all families that allow it.
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


# Families ---------------------------------------------------------------------------------------------------


@pytest.fixture
def under_tables(monkeypatch):
    """Run a model's own eager attention under a keep table for each layer, besides its own mask."""

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
def test_a_family_attends_as_its_own_eager_attention_would_under_the_same_blocks(family, under_tables):
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


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 64},
    "static in chunks": {"prefill_chunk_size": 64, "cache_implementation": "static"},
}


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("tokens", [TOKENS, PADDED], ids=["one", "left-padded"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "GptOss"])
def test_with_all_blocks_kept_generates_what_eager_generates(family, tokens, options):
    model = build(family)
    expected = generate(model, tokens)
    with sparse(model, EVERYTHING) as stats:
        assert torch.equal(generate(model, tokens, **options), expected)
    assert {call.dense for layer in stats.layers.values() for call in layer.calls} <= {None, "one block", "decode"}


# Prompts ----------------------------------------------------------------------------------------------------


def test_a_left_padded_row_equals_its_unpadded_prompt():
    model = build("Mistral")
    mask = (PADDED != 0).long()
    with sparse(model, HALF):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        together = logits(model, PADDED, attention_mask=mask, position_ids=positions)
        for row, start in enumerate((0, 53)):
            alone = logits(model, PADDED[row : row + 1, start:])
            torch.testing.assert_close(together[row : row + 1, start:], alone, atol=1e-4, rtol=1e-4)


def test_a_right_padded_row_equals_its_unpadded_prompt():
    model = build()
    tokens = torch.cat([TOKENS, F.pad(TOKENS[:, :150], (0, 53))])
    with sparse(model, HALF):
        together = logits(model, tokens, attention_mask=(tokens != 0).long())
        for row, end in enumerate((LENGTH, 150)):
            alone = logits(model, tokens[row : row + 1, :end])
            torch.testing.assert_close(together[row : row + 1, :end], alone, atol=1e-4, rtol=1e-4)


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
    + [(TOKENS, {"prompt_lookup_num_tokens": 3})],  # transformers looks up in single rows only
)
def test_chunks_of_attention_are_separate_prompts(tokens, options):
    types = ["chunked_attention", "full_attention"]
    model = build("Llama4Text", **CHUNKS, layer_types=types, no_rope_layers=[1, 0])
    mask = (tokens != 0).long()
    expected = generate(model, tokens), logits(model, tokens, attention_mask=mask)
    with sparse(model, EVERYTHING) as stats:
        made = logits(model, tokens, attention_mask=mask)
        assert [len(layer.calls) for layer in stats.layers.values()] == ([5, 1] if len(tokens) == 1 else [9 + 2, 2])
        assert torch.equal(generate(model, tokens, **options), expected[0])
    torch.testing.assert_close(made[mask.bool()], expected[1][mask.bool()], atol=2e-3, rtol=1e-3)


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
        with torch.no_grad():  # drafts that are right sometimes
            for parameter in assistant.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
        given = {"assistant_model": assistant} if "assistant_model" in options else options
        with sparse(model, strategy) as stats:
            expected = generate(model, tokens, max_new_tokens=24)
            calls = [layer.calls.copy() for layer in stats.layers.values()]
            assert torch.equal(generate(model, tokens, max_new_tokens=24, **given), expected)
        for layer, before in zip(stats.layers.values(), calls, strict=True):  # statistics leave out guesses
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


def test_a_conversation_continues_in_its_cache():
    model = build("Mistral")

    def turns() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        options = {"past_key_values": cache, "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        said = torch.cat([model.generate(TOKENS, **options), TOKENS[:, :60]], 1)
        return model.generate(said, **options)

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
        remembered = in_chunks()
        assert len(binding.states) == 0  # gone with the cache
        monkeypatch.setattr(attention, "continued_key_state", lambda *args: None)
        assert torch.equal(in_chunks(), remembered)
    assert stats.density < 1


def test_a_key_state_belongs_to_one_cache_and_one_history():
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
        for token in TOKENS[0, :8]:  # another end of the same length
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
    assert not torch.allclose(got, want, atol=1e-3)  # the cache is read densely


# Refusals ---------------------------------------------------------------------------------------------------


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
    expected, made = logits(model), generate(model)
    with sparse(model, sp.Plan(default=EVERYTHING, layers={0: "a_shape"})) as stats:
        torch.testing.assert_close(logits(model), expected, atol=2e-3, rtol=1e-3)
        assert torch.equal(generate(model), made)
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
    expected, made = logits(model), generate(model)
    with sparse(model, sp.Plan(default=EVERYTHING, layers={3: "a_shape"})) as stats:
        torch.testing.assert_close(logits(model), expected, atol=2e-3, rtol=1e-3)
        assert torch.equal(generate(model), made)
    assert [(index, layer.strategy) for index, layer in stats.layers.items()] == [(1, "flex_prefill"), (3, "a_shape")]
    module = next(module for module in attention_modules(model) if module.layer_idx is None)
    with pytest.raises(ValueError, match=r"without a layer_idx.*sparse\(model"):
        attention.bind_default(module, HALF)


def test_a_model_whose_code_reads_the_mask_is_refused():
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
    ids=["no model", "no strategy", "a number", "a plan of another model", "Bloom", "Mamba", "FalconMamba"],
)
def test_unsupported_models_and_strategies_are_refused_and_models_stay_unchanged(model, strategy, message):
    model = model()
    before = getattr(model, "config", None)
    with pytest.raises(ValueError, match=message), sparse(model, strategy):
        raise ValueError("entered")
    assert getattr(model, "config", None) is before


# The model afterwards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_model_is_restored_after_an_exception_inside_generate(implementation):
    model = build(attention=implementation)
    config, keys, kind, before = model.config, list(model.state_dict()), type(model), logits(model)

    class Broken(sp.Strategy):
        def score(self, q, k, prompt):
            raise KeyError("nothing here")

    plan = sp.Plan(default=SHAPE, layers={1: Broken(block_size=BLOCK, min_length=0)})
    with pytest.raises(RuntimeError, match=r"In layer 1 \(Broken\): 'nothing here'") as caught, sparse(model, plan):
        generate(model)
    assert isinstance(caught.value.__cause__, KeyError)
    assert_untouched(model, implementation, config, keys)
    assert type(model) is kind
    assert torch.equal(logits(model), before)


def test_blocks_nest_and_the_inner_one_counts():
    model = build()
    config, keys = model.config, list(model.state_dict())
    with sparse(model, HALF) as outer:
        alone = logits(model)
        with sparse(model, EVERYTHING) as inner:
            logits(model)
        assert torch.equal(logits(model), alone)
    assert [len(layer.calls) for layer in outer.layers.values()] == [2, 2]
    assert inner.density == 1
    assert_untouched(model, "eager", config, keys)


def test_models_that_share_a_config_have_separate_bindings():
    one = build()
    other = type(one)(one.config).eval()
    assert other.config is one.config
    eager = logits(other)
    with sparse(one, HALF) as stats:
        assert torch.equal(logits(other), eager)
        with sparse(other, EVERYTHING) as others:
            torch.testing.assert_close(logits(other), eager, atol=2e-3, rtol=1e-3)
            logits(one)
    assert stats.density < others.density == 1


def test_threads_can_run_separate_models():
    models = [build("Qwen3") for _ in range(2)]
    strategies = [HALF, SHAPE]

    def run(model, strategy) -> tuple[torch.Tensor, float]:
        with sparse(model, strategy) as stats:
            made = [generate(model) for _ in range(3)]
        assert all(torch.equal(one, made[0]) for one in made)
        return made[0], stats.density

    alone = [run(model, strategy) for model, strategy in zip(models, strategies, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, models, strategies))
    for (tokens, density), (expected, by_itself) in zip(together, alone, strict=True):
        assert torch.equal(tokens, expected)
        assert density == by_itself
    assert alone[0][1] != alone[1][1]


def test_blocks_may_close_in_the_order_in_which_they_opened():
    model = build()
    config, keys, eager = model.config, list(model.state_dict()), logits(model)
    one, two = sparse(model, HALF), sparse(model, SHAPE)
    one.__enter__()
    two.__enter__()
    shape = logits(model)
    one.__exit__(None, None, None)
    assert torch.equal(logits(model), shape)
    two.__exit__(None, None, None)
    assert_untouched(model, "eager", config, keys)
    assert torch.equal(logits(model), eager)


def test_a_block_of_another_thread_on_the_same_model_is_refused():
    model = build()
    config, keys = model.config, list(model.state_dict())

    def enter() -> None:
        with sparse(model, SHAPE):
            pass

    with sparse(model, HALF), ThreadPoolExecutor(1) as pool:
        expected = logits(model)
        with pytest.raises(ValueError, match="Another thread has this model"):
            pool.submit(enter).result()
        assert torch.equal(pool.submit(logits, model).result(), expected)
    assert_untouched(model, "eager", config, keys)
    enter()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "saved"], ids=str)
def test_a_copy_made_inside_a_block_stays_sparse(way, tmp_path, monkeypatch):
    for registry in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(registry, "_global_mapping", dict(registry._global_mapping))
    model = build()
    config, keys = model.config, list(model.state_dict())
    with sparse(model, HALF):
        expected = logits(model)
        if way == "saved":
            torch.save(model, tmp_path / "model")
            for registry in (AttentionInterface, AttentionMaskInterface):  # as in another process
                registry._global_mapping.pop("sparse_prefill")
            other = torch.load(tmp_path / "model", weights_only=False)
        else:
            other = way(model)
    assert_untouched(model, "eager", config, keys)
    assert torch.equal(logits(other), expected)
    other.set_attn_implementation("eager")
    assert torch.equal(logits(other), logits(model))
    assert_untouched(other, "eager", other.config, keys)


# Ways to run ------------------------------------------------------------------------------------------------


def test_a_compiled_model_attends_as_an_uncompiled_one():
    model = build()
    eager = logits(model)
    with sparse(model, HALF):
        expected, made = logits(model), generate(model)
    compiled = torch.compile(model, backend="eager")
    with sparse(compiled, HALF) as stats:
        torch.testing.assert_close(logits(compiled), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(generate(compiled), made)
    assert stats.density < 1
    torch.testing.assert_close(logits(compiled), eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_decoding_stays_one_graph(family):
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
        expected, made = logits(model, use_cache=use_cache), generate(model)
        for strategy in (EVERYTHING, HALF):
            with sparse(model, strategy) as stats:
                out = logits(model, use_cache=use_cache)
                tokens = generate(model)
                assert torch.equal(generate(model, prompt_lookup_num_tokens=3), tokens)
            if strategy is EVERYTHING:
                torch.testing.assert_close(out, expected, atol=0.3, rtol=0.1)
                assert made.shape == tokens.shape
            else:
                assert stats.density < 1
                assert out.isfinite().all()


def test_inference_mode_runs_as_no_grad_does():
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
        made = pipe(texts, max_new_tokens=NEW, do_sample=False, batch_size=2, return_full_text=False, eos_token_id=-1)
    expected = tokenizer.batch_decode(generate(model, PADDED), skip_special_tokens=True)
    assert [one[0]["generated_text"].strip() for one in made] == expected
    assert [len(layer.calls) for layer in stats.layers.values()] == [2, 2]


def test_models_loaded_under_the_library_s_name_are_sparse(tmp_path, monkeypatch):
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


# Layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("Llama", {}, [("half_split", 8), ("half_split", 8)]),
        ("SmolLM3", {}, [("half_split", 8), None]),
        ("Gemma3Text", {}, [("half_split", 8), ("half_split", 8)]),
        ("GptOss", {}, [("half_split", 8), ("half_split", 8)]),
        ("Glm4", {"head_dim": 16}, [("interleaved", 4), ("interleaved", 4)]),
        ("Cohere", {}, [("interleaved", 8), ("interleaved", 8)]),
        ("Cohere2", {"sliding_window": WINDOW}, [None, None]),
    ],
)
def test_strategies_receive_the_rotary_embedding_if_it_is_certain(family, options, expected):
    layers = []

    class Listening(sp.Strategy):
        def for_layer(self, layer):
            layers.append(layer)
            return self

    with sparse(build(family, **options), Listening(block_size=BLOCK)):
        pass
    assert [(layer.index, layer.count) for layer in layers] == [(0, 2), (1, 2)]
    ropes = [None if layer.rope is None else (layer.rope.layout, len(layer.rope.frequencies)) for layer in layers]
    assert ropes == expected


# Statistics -------------------------------------------------------------------------------------------------


def test_statistics_cover_each_layer_and_head():
    model = build()
    plan = sp.Plan(default=SHAPE, layers={1: sp.get_strategy("a_shape", block_size=BLOCK, min_length=500)})
    with sparse(model, plan) as stats, sp.record() as calls:
        generate(model, PADDED)
    assert [call.dense for call in calls] == [None, None, "min_length", "min_length"]
    data = stats.to_dict()
    first, second = data["layers"]
    assert (first["layer"], first["strategy"], first["calls"], first["dense"]) == (0, "a_shape", 2, {})
    assert (second["layer"], second["calls"], second["dense"]) == (1, 2, {"min_length": 2})
    assert second["density"] == [1.0] * 4
    assert len(first["density"]) == 4
    assert all(0 < density < 0.9 for density in first["density"])
    assert first["seconds"].keys() == {"estimate", "select", "table", "kernel"}
    assert data["density"] == pytest.approx((first["density"][0] + 1) / 2)
    lines = str(stats).splitlines()
    assert lines[0].split() == ["layer", "strategy", "calls", "dense", "density", "heads", "seconds"]
    assert "2 min_length" in lines[2]


def test_density_weights_calls_by_their_token_pairs():
    stats = Stats()
    stats.add(0, 2, [sp.Call("a", 3, 3, density=torch.tensor([[0.5, 1.0]])), sp.Call("a", 1, 2)])
    assert stats.layers[0].density.tolist() == [pytest.approx((6 * 0.5 + 2) / 8), 1.0]


def test_without_statistics_no_calls_are_gathered():
    model = build()
    with sparse(model, SHAPE, stats=False) as stats, sp.record() as calls:
        logits(model)
    assert len(calls) == 2
    assert stats.to_dict() == {"density": 1.0, "layers": []}

"""Prefill: chunks, padding, caches and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torchtune.modules.common_utils import delete_kv_caches

import sparse_prefill as sp
from sparse_prefill.models.torchtune import (
    generate,
    likelihood,
    prefill,
    score,
    sparsify,
)
from tests.models.torchtune.small_decoders import (
    DENSE,
    EVERYTHING,
    FLASH,
    HALF,
    LENGTH,
    LLAMA,
    MOBA,
    NEW,
    SMALL,
    SMALL_SHAPE,
    TOKENS,
    build,
    caches,
)


def test_outputs_of_padding_are_zero_and_its_content_does_not_matter():
    attn = sparsify(build(), HALF).layers[0].attn
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    prompt = sp.Prompt(q_len=64, block_size=16, left_padding=[0, 20])
    with torch.inference_mode():
        out = attn(x, x, mask=prompt)
        x[1, :20] = 7.0
        changed = attn(x, x, mask=prompt)
    assert torch.equal(out[1, :20], torch.zeros(20, 64))  # no bias in this projection
    assert torch.equal(changed, out)


def test_prefill_in_chunks_equals_one_prefill():
    model = sparsify(build(), DENSE)
    whole = prefill(model, TOKENS)
    with caches(model):
        for chunk in TOKENS.split(64, dim=1):
            logits = prefill(model, chunk)
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)


def test_chunks_of_a_padded_batch_equal_one_prefill():
    model = sparsify(build(), DENSE)
    batch = torch.cat([TOKENS, F.pad(TOKENS[:, :103], (100, 0))])  # the second row's first chunk is all padding
    whole = prefill(model, batch, left_padding=[0, 100])
    with caches(model, batch=2):
        for chunk in batch.split(64, dim=1):
            logits = prefill(model, chunk, left_padding=[0, 100])
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "lengths"), [(64, [64, 64, 64, 11]), (101, [101, 102]), (500, [LENGTH])])
def test_generation_from_a_prompt_in_chunks_equals_that_from_one_piece(size, lengths):
    model = sparsify(build(), DENSE)
    whole = generate(model, TOKENS, max_new_tokens=NEW)
    with sp.record() as calls:
        chunked = generate(model, TOKENS, max_new_tokens=NEW, prefill_chunk_size=size)
    assert [call.q_len for call in calls if call.q_len > 1] == [length for length in lengths for _ in range(2)]
    assert torch.equal(chunked.tokens, whole.tokens)
    torch.testing.assert_close(chunked.prompt_logits, whole.prompt_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", [FLASH, MOBA], ids=lambda strategy: strategy.name)
def test_chunks_of_whole_blocks_select_the_same_blocks_as_the_whole_prompt(strategy):
    assert strategy.chunk_invariant
    model = sparsify(build(), strategy)
    whole, dense = prefill(model, TOKENS), prefill(sparsify(build(), DENSE), TOKENS)
    for padding in (0, 48):
        tokens = F.pad(TOKENS, (padding, 0))
        with caches(model, slots=LENGTH + padding), sp.record() as calls:
            found = prefill(model, tokens, prefill_chunk_size=64, left_padding=[padding])
        assert min(float(call.density.min()) for call in calls) < 0.8
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)
    assert (whole - dense).abs().max() > 1e-3


def test_chunks_in_separate_calls_take_the_total_length():
    model = sparsify(build(), sp.get_strategy("a_shape", last=40, **SMALL))
    whole = prefill(model, TOKENS)
    found = []
    for total_len in (LENGTH, None):
        with caches(model):
            for chunk in TOKENS.split(64, dim=1):
                logits = prefill(model, chunk, total_len=total_len)
            found.append(logits)
    torch.testing.assert_close(found[0], whole, atol=1e-5, rtol=1e-4)
    assert (found[1] - whole).abs().max() > 1e-3  # each chunk's last rows were dense


def test_last_positions_may_lie_in_several_chunks():
    model = sparsify(build(), DENSE)
    whole = prefill(model, TOKENS, last=100)
    with caches(model):
        torch.testing.assert_close(prefill(model, TOKENS, last=100, prefill_chunk_size=64), whole, atol=1e-4, rtol=1e-4)


def test_the_key_state_is_kept_until_the_caches_are_reset():
    model = sparsify(build(), FLASH)
    attn = model.layers[0].attn
    first, other = TOKENS[:, :128], TOKENS.flip(1)[:, :128]
    want = prefill(model, torch.cat([other[:, :64], first[:, :64]], 1))
    with caches(model):
        prefill(model, first, prefill_chunk_size=64)
        state = attn.kv_cache.key_state
        prefill(model, TOKENS[:, 128:160])
        assert attn.kv_cache.key_state is state
        model.reset_caches()
        assert attn.kv_cache.key_state is None
        prefill(model, other[:, :64])
        assert attn.kv_cache.key_state is not state
        torch.testing.assert_close(prefill(model, first[:, :64]), want, atol=1e-5, rtol=1e-4)


def test_chunks_without_caches_or_of_one_token_are_refused():
    model = sparsify(build(), DENSE)
    with pytest.raises(ValueError, match=r"call model.setup_caches\(\), or leave prefill_chunk_size out"):
        prefill(model, TOKENS, prefill_chunk_size=64)
    with pytest.raises(ValueError, match="prefill_chunk_size must be a whole number, 2 or more"):
        generate(model, TOKENS, max_new_tokens=1, prefill_chunk_size=1)


def test_an_error_names_its_layer():
    class Failing(type(DENSE)):
        def dense_reason(self, prompt, device):
            raise RuntimeError("out of luck")

    model = sparsify(build(), sp.Plan(default=DENSE, layers={1: Failing(block_size=16)}))
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        prefill(model, TOKENS)
    assert caught.value.__notes__ == ["in layer 1 of 2, counted from 0"]


@pytest.mark.parametrize("padding", [[1, 2, 3], [3], 3, [[1], [2]], [0.0, 1.0], [-1, 0]], ids=str)
def test_padding_must_be_one_whole_number_for_each_row(padding):
    model, batch = sparsify(build(), HALF), TOKENS.expand(2, -1)
    for call in (
        lambda: prefill(model, batch, left_padding=padding),
        lambda: generate(model, batch, max_new_tokens=2, left_padding=padding),
        lambda: likelihood(model, batch, last=4, left_padding=padding),
        lambda: score(model, batch, batch[:, :4], left_padding=padding),
    ):
        with pytest.raises(ValueError, match=r"left_padding must be (2 whole numbers|0 or more)"):
            call()


@pytest.mark.parametrize("strategy", [HALF, SMALL_SHAPE, FLASH], ids=lambda strategy: strategy.name)
@pytest.mark.parametrize("padding", [0, 20])
def test_verifying_several_guesses_equals_decoding_single_tokens(strategy, padding):
    model = sparsify(build(), strategy)
    tokens, guesses = F.pad(TOKENS[:, :150], (padding, 0)), TOKENS[:, 150:155]

    def after_the_prompt(parts):
        with caches(model, slots=LENGTH + padding):
            prefill(model, tokens, left_padding=[padding])
            with sp.record() as calls:
                logits = torch.cat([prefill(model, part, last=5, left_padding=[padding]) for part in parts], 1)
        return logits, calls

    together, calls = after_the_prompt([guesses])
    assert {call.dense for call in calls} == {"decode"}
    torch.testing.assert_close(together, after_the_prompt(guesses.split(1, 1))[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_mixed_precision_keeps_the_caches_dtype(cached):
    stock = build()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            expected = stock(TOKENS)[:, -1:]
        model = sparsify(stock, EVERYTHING)
        if not cached:
            torch.testing.assert_close(prefill(model, TOKENS).float(), expected.float(), atol=0.3, rtol=0.1)
            return
        with caches(model, slots=LENGTH + 1):
            found = prefill(model, TOKENS, prefill_chunk_size=64)
            assert model.layers[0].attn.kv_cache.k_cache.dtype == torch.float32
            prefill(model, TOKENS[:, :1])
        assert generate(model, TOKENS, max_new_tokens=2).tokens.shape == (1, 2)
    torch.testing.assert_close(found.float(), expected.float(), atol=0.3, rtol=0.1)


def test_prompts_that_do_not_fit_the_caches_are_refused():
    model = sparsify(build(), DENSE)
    model.setup_caches(1, torch.float32, decoder_max_seq_len=LENGTH)
    positions = torch.arange(LENGTH)[None]
    with torch.inference_mode():
        prefill(model, TOKENS[:, :100])
        with pytest.raises(ValueError, match="hold 100 tokens and 203 are added"):
            model(TOKENS, mask=sp.Prompt(q_len=LENGTH, block_size=16), input_pos=positions)
        with pytest.raises(ValueError, match="have 203 slots"):
            prefill(model, TOKENS[:, :120])
        with pytest.raises(ValueError, match="delete_kv_caches"):
            generate(model, TOKENS, max_new_tokens=1)
        model.reset_caches()
        again = prefill(model, TOKENS)
    delete_kv_caches(model)
    torch.testing.assert_close(again, prefill(model, TOKENS))


def test_dropout_in_training_mode_is_refused():
    model = sparsify(build(**LLAMA, attn_dropout=0.1), DENSE).train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        prefill(model, TOKENS)
    assert prefill(model.eval(), TOKENS).shape == (1, 1, 128)

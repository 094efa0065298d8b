"""Sparse prefill in torchtune models, compared with torchtune's own dense generation."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.generation import generate as stock_generate
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.qwen2 import qwen2
from torchtune.modules import MultiHeadAttention, RMSNorm, TransformerDecoder
from torchtune.modules.common_utils import delete_kv_caches, local_kv_cache
from torchtune.modules.peft import get_adapter_params

import sparse_prefill as sp
from sparse_prefill.models.torchtune import (
    LastTokenDecoder,
    generate,
    generate_packed,
    likelihood,
    prefill,
    prefill_packed,
    score,
    sparsify,
)
from sparse_prefill.packing import pack

SIZES = {
    "vocab_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": 256,
}
LLAMA = SIZES | {"scale_factor": 1}
LORA = {"lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "lora_rank": 4, "lora_alpha": 8}
LENGTH, NEW = 203, 8
TOKENS = torch.randint(1, 128, (1, LENGTH), generator=torch.Generator().manual_seed(3))

EVERYTHING = sp.get_strategy("flex_prefill", gamma=1.0, tau=0.0, block_size=16, min_length=0)
HALF = sp.get_strategy("flex_prefill", gamma=0.5, tau=0.0, block_size=16, min_length=0)
DENSE = sp.get_strategy("dense", block_size=16)
SMALL = {"block_size": 16, "min_length": 0, "sink": 16, "local": 16}
FLASH = sp.get_strategy("flash_prefill", alpha=0.5, last=40, **SMALL)
SMALL_SHAPE = sp.get_strategy("a_shape", **SMALL)
MOBA = sp.get_strategy("moba", k=3, last=40, **SMALL)


def build(builder=llama3_2, **options) -> TransformerDecoder:
    """A random decoder with attention sharp enough for a selection to matter."""
    torch.manual_seed(0)
    model = builder(**options or LLAMA).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tok_embeddings" in name:
                parameter.mul_(0.3)
            elif "lora_b" in name:
                parameter.normal_(std=0.02)
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(3)
    return model


def stock(model: TransformerDecoder, tokens: torch.Tensor = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens and the logits after the prompt, by torchtune."""
    everything, logits = stock_generate(model, tokens, max_generated_tokens=NEW, top_k=1, pad_id=-1)
    return everything[:, tokens.shape[1] :], logits[:, 0]


@contextmanager
def caches(model: LastTokenDecoder, batch: int = 1, slots: int = LENGTH):
    with local_kv_cache(
        model, batch_size=batch, device=torch.device("cpu"), dtype=torch.float32, decoder_max_seq_len=slots
    ):
        yield


@pytest.mark.parametrize(
    ("builder", "options"),
    [
        (llama3_2, LLAMA),
        (llama3_2, LLAMA | {"scale_factor": 32, "tie_word_embeddings": False}),
        (qwen2, SIZES),
        (mistral, SIZES),
        (lora_llama3_2, LLAMA | LORA),
    ],
    ids=["llama3_2", "llama3_2 untied", "qwen2", "mistral", "lora_llama3_2"],
)
def test_with_all_blocks_kept_generates_what_torchtune_generates(builder, options):
    model = build(builder, **options)
    expected, logits = stock(model)

    for strategy in (EVERYTHING, DENSE):
        made = generate(sparsify(model, strategy), TOKENS, max_new_tokens=NEW)
        assert torch.equal(made.tokens, expected)
        torch.testing.assert_close(made.prompt_logits, logits, atol=2e-4, rtol=1e-4)


def test_queries_and_keys_are_normalised_where_torchtune_does_it():
    model = build()
    for layer in model.layers:
        layer.attn.q_norm, layer.attn.k_norm = RMSNorm(16), RMSNorm(16)
        torch.nn.init.normal_(layer.attn.q_norm.scale, 2.0)
        torch.nn.init.normal_(layer.attn.k_norm.scale, 2.0)
    _, logits = stock(model)
    made = generate(sparsify(model, DENSE), TOKENS, max_new_tokens=1)
    torch.testing.assert_close(made.prompt_logits, logits, atol=2e-4, rtol=1e-4)


def test_a_sparse_strategy_skips_blocks_in_every_layer_and_changes_the_result():
    model = build()
    with sp.record() as calls:
        sparse = generate(sparsify(model, HALF), TOKENS, max_new_tokens=2).prompt_logits
    dense = generate(sparsify(model, DENSE), TOKENS, max_new_tokens=1).prompt_logits

    assert [call.dense for call in calls] == [None, None, "decode", "decode"]
    assert all(call.density.max() < 0.9 for call in calls[:2])
    assert (sparse - dense).abs().max() > 0.01


def test_a_left_padded_row_equals_its_unpadded_prompt():
    model = sparsify(build(), HALF)
    short = TOKENS[:, :150]
    padding = LENGTH - short.shape[1]  # 53: no multiple of the block
    batch = torch.cat([TOKENS, F.pad(short, (padding, 0))])

    with sp.record() as calls:
        together = generate(model, batch, max_new_tokens=NEW, left_padding=[0, padding])

    assert [call.kv_len for call in calls[:4]] == [LENGTH, 150, LENGTH, 150]
    assert all(call.density.max() < 0.9 for call in calls[:4])
    for row, prompt in enumerate((TOKENS, short)):
        alone = generate(model, prompt, max_new_tokens=NEW)
        assert torch.equal(together.tokens[row], alone.tokens[0])
        torch.testing.assert_close(together.prompt_logits[row], alone.prompt_logits[0], atol=1e-5, rtol=1e-4)


def test_a_left_padded_row_is_scored_as_its_unpadded_prompt():
    model = sparsify(build(), HALF)
    batch = torch.cat([TOKENS, F.pad(TOKENS[:, 53:], (53, 0))])
    answer = torch.tensor([[5, 6, 7]])
    together = score(model, batch, answer.expand(2, -1), left_padding=torch.tensor([0, 53]))
    for row, prompt in enumerate((TOKENS, TOKENS[:, 53:])):
        torch.testing.assert_close(together.nll[row], score(model, prompt, answer).nll[0], atol=1e-5, rtol=1e-4)


def test_positions_count_from_the_first_real_token_through_prefill_and_decoding():
    model = sparsify(build(), DENSE)
    seen = []
    rope = model.layers[0].attn.pos_embeddings
    rope.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_pos"]), with_kwargs=True)
    generate(model, torch.ones(2, 5, dtype=torch.int64), max_new_tokens=2, left_padding=[0, 3])
    assert seen[0].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert seen[-1].tolist() == [[5], [2]]


def test_padding_rows_come_out_zero_and_content_of_padding_does_not_matter():
    attn = sparsify(build(), HALF).layers[0].attn
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    prompt = sp.Prompt(q_len=64, block_size=16, left_padding=[0, 20])
    with torch.inference_mode():
        out = attn(x, x, mask=prompt)
        x[1, :20] = 7.0
        changed = attn(x, x, mask=prompt)
    assert torch.equal(out[1, :20], torch.zeros(20, 64))  # no bias in this projection
    assert torch.equal(changed, out)


def test_each_row_of_an_unpadded_batch_equals_its_prompt_in_a_separate_call():
    model = sparsify(build(), HALF)
    batch = torch.cat([TOKENS, TOKENS.flip(1)])
    together = generate(model, batch, max_new_tokens=NEW)
    for row in range(2):
        assert torch.equal(together.tokens[row], generate(model, batch[row, None], max_new_tokens=NEW).tokens[0])


def test_chunks_into_a_cache_equal_one_prefill():
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
def test_a_prompt_in_chunks_generates_what_it_generates_in_one_piece(size, lengths):
    model = sparsify(build(), DENSE)
    whole = generate(model, TOKENS, max_new_tokens=NEW)
    with sp.record() as calls:
        chunked = generate(model, TOKENS, max_new_tokens=NEW, prefill_chunk_size=size)
    assert [call.q_len for call in calls if call.q_len > 1] == [length for length in lengths for _ in range(2)]
    assert torch.equal(chunked.tokens, whole.tokens)
    torch.testing.assert_close(chunked.prompt_logits, whole.prompt_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", [FLASH, MOBA], ids=lambda strategy: strategy.name)
def test_chunks_of_whole_blocks_select_what_the_whole_prompt_selects(strategy):
    assert strategy.chunk_invariant
    model = sparsify(build(), strategy)
    whole, blind = prefill(model, TOKENS), prefill(sparsify(build(), DENSE), TOKENS)
    for padding in (0, 48):
        tokens = F.pad(TOKENS, (padding, 0))
        with caches(model, slots=LENGTH + padding), sp.record() as calls:
            found = prefill(model, tokens, prefill_chunk_size=64, left_padding=[padding])
        assert min(float(call.density.min()) for call in calls) < 0.8
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)
    assert (whole - blind).abs().max() > 1e-3


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


def test_the_key_state_lives_as_long_as_the_keys():
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


def test_chunks_need_caches_and_more_than_a_token():
    model = sparsify(build(), DENSE)
    with pytest.raises(ValueError, match=r"call model.setup_caches\(\), or leave prefill_chunk_size out"):
        prefill(model, TOKENS, prefill_chunk_size=64)
    with pytest.raises(ValueError, match="prefill_chunk_size must be a whole number, 2 or more"):
        generate(model, TOKENS, max_new_tokens=1, prefill_chunk_size=1)


PROMPTS = [TOKENS[0, :90], TOKENS[0], TOKENS[0, 100:140], TOKENS[0, 53:], torch.tensor([7])]


@pytest.mark.parametrize("capacity", [None, 256])
def test_packed_prompts_give_the_tokens_of_separate_calls(capacity):
    model = sparsify(build(), HALF)
    with sp.record() as calls:
        together = generate_packed(model, PROMPTS, max_new_tokens=NEW, capacity=capacity)

    prefilled = [call for call in calls if call.kv_len in map(len, PROMPTS) and call.dense != "decode"]
    assert sum(float(call.density.max()) < 0.95 for call in prefilled) == 4  # two prompts in two layers
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt[None], max_new_tokens=NEW)
        assert torch.equal(together.tokens[row], alone.tokens[0])
        torch.testing.assert_close(together.prompt_logits[row], alone.prompt_logits[0], atol=1e-5, rtol=1e-4)
    assert not model.caches_are_setup()
    assert together.prefill_seconds > 0


def test_packed_prompts_need_no_caches_for_their_logits():
    model = sparsify(build(), HALF)
    logits = prefill_packed(model, pack(PROMPTS))
    assert logits.shape == (len(PROMPTS), 128)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(logits[row], prefill(model, prompt[None])[0, -1], atol=1e-5, rtol=1e-4)


def test_packed_prompts_that_do_not_fit_are_refused():
    model = sparsify(build(), HALF)
    with pytest.raises(ValueError, match="takes 256 tokens, got 293"):
        generate_packed(model, [TOKENS[0], TOKENS[0, :90]], max_new_tokens=1, capacity=300)
    with pytest.raises(ValueError, match="don't fit into the model's 256"):
        generate_packed(model, PROMPTS, max_new_tokens=54)
    with pytest.raises(ValueError, match=r"sparsify\(\) first"):
        generate_packed(build(), PROMPTS, max_new_tokens=1)
    packed = pack(PROMPTS)
    with caches(model, batch=len(packed.tokens)):
        prefill_packed(model, packed)
        with pytest.raises(ValueError, match="need empty caches, but these hold 203"):
            prefill_packed(model, packed)


def test_an_error_names_its_layer():
    class Failing(type(DENSE)):
        def dense_reason(self, prompt, device):
            raise RuntimeError("out of luck")

    model = sparsify(build(), sp.Plan(default=DENSE, layers={1: Failing(block_size=16)}))
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        prefill(model, TOKENS)
    assert caught.value.__notes__ == ["in layer 1 of 2, counted from 0"]


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
    made = generate(model, TOKENS, max_new_tokens=NEW)
    assert torch.equal(made.tokens, stock(build())[0])


def test_sparsify_takes_a_name_and_keeps_caches():
    model = build()
    model.setup_caches(1, torch.float32, decoder_max_seq_len=LENGTH)
    sparse = sparsify(model, "a_shape")
    assert sparse.layers[1].attn.strategy == sp.get_strategy("a_shape")
    assert sparse.caches_are_enabled()
    assert sparse.decoder_max_cache_seq_len == LENGTH


def test_other_masks_run_torchtunes_dense_attention():
    model = build()
    sparse = sparsify(model, HALF)
    with torch.no_grad(), sp.record() as calls:
        torch.testing.assert_close(sparse(TOKENS), build()(TOKENS)[:, -1:])
    assert calls == []


def test_logits_are_computed_at_the_last_position_only():
    model = sparsify(build(**LLAMA, tie_word_embeddings=False), DENSE)
    rows = []
    model.output.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[1]))
    generate(model, TOKENS, max_new_tokens=2)
    score(model, TOKENS, TOKENS[:, :5])
    assert rows == [1, 1, 5]
    assert model.last == 1


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {
            tuple(x.shape) for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)
        }
        return out


def test_no_table_of_tokens_by_tokens_is_made():
    model = sparsify(build(), DENSE)
    with Shapes() as shapes:
        generate(model, TOKENS, max_new_tokens=4)
    assert (1, LENGTH, 64) in shapes.seen
    assert not [shape for shape in shapes.seen if sum(size >= LENGTH for size in shape) > 1]


def test_generation_ends_when_all_rows_stopped_and_repeats_stop_tokens_until_then():
    model = sparsify(build(**LLAMA, tie_word_embeddings=False), DENSE)
    batch = torch.cat([TOKENS, TOKENS.flip(1)])
    free = generate(model, batch, max_new_tokens=NEW).tokens
    stops = (int(free[0, 1]), int(free[1, 4]))
    first = [next(i for i, token in enumerate(row.tolist()) if token in stops) for row in free]
    assert len(set(free[0].tolist())) > 3  # so that repetition is visible

    seen = []
    stopped = generate(model, batch, max_new_tokens=NEW, stop_tokens=stops, on_token=seen.append).tokens

    assert first == [1, 4]
    assert stopped.tolist() == [[*free[0, :2].tolist(), *[int(free[0, 1])] * 3], free[1, :5].tolist()]
    assert torch.equal(torch.stack(seen, dim=1), stopped)
    assert not model.caches_are_setup()


def test_sampling_follows_the_seed_and_one_candidate_is_greedy():
    model = sparsify(build(), DENSE)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(generate(model, TOKENS, max_new_tokens=NEW, temperature=2.0).tokens)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    only = generate(model, TOKENS, max_new_tokens=NEW, temperature=1.0, top_k=1).tokens
    assert torch.equal(only, generate(model, TOKENS, max_new_tokens=NEW).tokens)


def test_a_dense_score_is_the_likelihood_under_torchtune():
    model = build()
    prompt, answer = TOKENS[:, :-6], TOKENS[:, -6:]
    with torch.no_grad():
        expected = F.cross_entropy(model(TOKENS)[:, -7:-1].transpose(1, 2), answer, reduction="none")
    found = score(sparsify(model, DENSE), prompt, answer)
    torch.testing.assert_close(found.nll, expected, atol=1e-4, rtol=1e-4)
    assert found.exact.tolist() == [False]


def test_an_answer_is_scored_inside_one_sparse_prefill():
    model = sparsify(build(), DENSE)
    greedy = generate(model, TOKENS, max_new_tokens=4).tokens
    assert score(model, TOKENS, greedy).exact.tolist() == [True]

    prompt, answer = TOKENS[:, :-6], TOKENS[:, -6:]
    dense = score(model, prompt, answer)
    blind = sparsify(model, sp.get_strategy("a_shape", sink=0, local=0, block_size=16, min_length=0))
    with sp.record() as calls:
        found = score(blind, prompt, answer)
    assert [(call.q_len, call.dense) for call in calls] == [(LENGTH - 1, None)] * 2
    assert (found.nll - dense.nll).abs().max() > 0.05


class OtherAttention(MultiHeadAttention):
    """An attention class that the library doesn't know."""


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
def test_several_guesses_are_verified_as_single_tokens_are_decoded(strategy, padding):
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

    class Curious(type(DENSE)):
        def for_layer(self, layer):
            layers.append(layer)
            return self

    model = builder(**SIZES)
    sparsify(model, Curious())
    assert [(layer.index, layer.count, layer.rope.layout) for layer in layers] == [(0, 2, layout), (1, 2, layout)]
    embedding, x = model.layers[0].attn.pos_embeddings, torch.randn(1, 4, 20, 16)
    want = embedding(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(layers[0].rope.rotate(x, torch.arange(20)), want)
    with torch.device("meta"):  # as recipes build large models
        sparsify(builder(**SIZES), Curious())
    assert layers[2].rope == layers[0].rope


def test_a_prompt_that_does_not_fit_what_the_caches_hold_is_refused():
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


def test_the_decoder_is_a_torchtune_decoder():
    model = sparsify(build(), HALF)
    assert type(model) is LastTokenDecoder
    assert isinstance(model, TransformerDecoder)

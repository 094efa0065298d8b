"""Generation from whole, chunked, padded and packed prompts, compared with torchtune's dense generation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.qwen2 import qwen2
from torchtune.modules import RMSNorm

import sparse_prefill as sp
from sparse_prefill.models.torchtune import (
    generate,
    generate_packed,
    prefill,
    prefill_packed,
    score,
    sparsify,
)
from sparse_prefill.packing import pack
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
    caches,
    stock,
)


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
def test_with_all_blocks_kept_generation_equals_that_of_torchtune(builder, options):
    model = build(builder, **options)
    expected, logits = stock(model)

    for strategy in (EVERYTHING, DENSE):
        generated = generate(sparsify(model, strategy), TOKENS, max_new_tokens=NEW)
        assert torch.equal(generated.tokens, expected)
        torch.testing.assert_close(generated.prompt_logits, logits, atol=2e-4, rtol=1e-4)


def test_queries_and_keys_are_normalised_as_in_torchtune():
    model = build()
    for layer in model.layers:
        layer.attn.q_norm, layer.attn.k_norm = RMSNorm(16), RMSNorm(16)
        torch.nn.init.normal_(layer.attn.q_norm.scale, 2.0)
        torch.nn.init.normal_(layer.attn.k_norm.scale, 2.0)
    _, logits = stock(model)
    generated = generate(sparsify(model, DENSE), TOKENS, max_new_tokens=1)
    torch.testing.assert_close(generated.prompt_logits, logits, atol=2e-4, rtol=1e-4)


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
    padding = LENGTH - short.shape[1]  # 53, which isn't a multiple of the block size
    batch = torch.cat([TOKENS, F.pad(short, (padding, 0))])

    with sp.record() as calls:
        together = generate(model, batch, max_new_tokens=NEW, left_padding=[0, padding])

    assert [call.kv_len for call in calls[:4]] == [LENGTH, 150, LENGTH, 150]
    assert all(call.density.max() < 0.9 for call in calls[:4])
    for row, prompt in enumerate((TOKENS, short)):
        separate = generate(model, prompt, max_new_tokens=NEW)
        assert torch.equal(together.tokens[row], separate.tokens[0])
        torch.testing.assert_close(together.prompt_logits[row], separate.prompt_logits[0], atol=1e-5, rtol=1e-4)


def test_positions_count_from_the_first_real_token_through_prefill_and_decoding():
    model = sparsify(build(), DENSE)
    seen = []
    rope = model.layers[0].attn.pos_embeddings
    rope.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_pos"]), with_kwargs=True)
    generate(model, torch.ones(2, 5, dtype=torch.int64), max_new_tokens=2, left_padding=[0, 3])
    assert seen[0].tolist() == [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]]
    assert seen[-1].tolist() == [[5], [2]]


def test_each_row_of_an_unpadded_batch_equals_its_prompt_in_a_separate_call():
    model = sparsify(build(), HALF)
    batch = torch.cat([TOKENS, TOKENS.flip(1)])
    together = generate(model, batch, max_new_tokens=NEW)
    for row in range(2):
        assert torch.equal(together.tokens[row], generate(model, batch[row, None], max_new_tokens=NEW).tokens[0])


PROMPTS = [TOKENS[0, :90], TOKENS[0], TOKENS[0, 100:140], TOKENS[0, 53:], torch.tensor([7])]


@pytest.mark.parametrize("capacity", [None, 256])
def test_packed_prompts_give_the_tokens_of_separate_calls(capacity):
    model = sparsify(build(), HALF)
    with sp.record() as calls:
        together = generate_packed(model, PROMPTS, max_new_tokens=NEW, capacity=capacity)

    prefilled = [call for call in calls if call.kv_len in map(len, PROMPTS) and call.dense != "decode"]
    assert sum(float(call.density.max()) < 0.95 for call in prefilled) == 4  # two prompts in two layers
    for row, prompt in enumerate(PROMPTS):
        separate = generate(model, prompt[None], max_new_tokens=NEW)
        assert torch.equal(together.tokens[row], separate.tokens[0])
        torch.testing.assert_close(together.prompt_logits[row], separate.prompt_logits[0], atol=1e-5, rtol=1e-4)
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


def test_logits_are_computed_at_the_last_position_only():
    model = sparsify(build(**LLAMA, tie_word_embeddings=False), DENSE)
    rows = []
    model.output.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[1]))
    generate(model, TOKENS, max_new_tokens=2)
    score(model, TOKENS, TOKENS[:, :5])
    assert rows == [1, 1, 5]
    assert model.last == 1


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {
            tuple(x.shape) for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)
        }
        return out


def test_no_tensor_of_tokens_by_tokens_is_allocated():
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
    assert len(set(free[0].tolist())) > 3  # so that repeated stop tokens can be seen

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

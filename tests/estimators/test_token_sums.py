"""The GPU path of token_by_mean, FlexAttention with means as queries, equals plain loops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill.estimators import token_block, token_sums
from tests.estimators.token_prompts import every_prompt, inputs


def log_sums_of_listed_blocks(q, k, v, *, block_mask, return_aux, kernel_options):
    """Replace FlexAttention's kernel: return the log-sum-exp over the keys in listed blocks, and no output."""
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    at = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    unmasked, (rows, columns) = block_mask.mask_mod(*at), block_mask.BLOCK_SIZE
    allowed = torch.zeros_like(scores, dtype=torch.bool)
    lists = ((block_mask.kv_num_blocks, block_mask.kv_indices), (block_mask.full_kv_num_blocks, None))
    for counts, indices in lists:
        assert indices is None or not indices.any(), "the only block of keys is block 0"
        assert counts.max() <= 1
        listed = counts.repeat_interleave(rows, 2)[:, :, : scores.shape[2], None].bool()
        allowed |= listed & (unmasked if indices is not None else torch.ones_like(unmasked))
    assert columns == k.shape[2] == v.shape[2]
    assert return_aux.lse
    lse = scores.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    return None, SimpleNamespace(lse=lse.float())


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(token_block, "gpu_multiplies", lambda q: q.dtype != torch.float32)


@pytest.fixture
def by_lists(on_a_gpu, monkeypatch):
    monkeypatch.setattr(token_sums, "flex_attention", log_sums_of_listed_blocks)


def in_half(**sizes):
    q, k, prompt = inputs(**sizes)
    return q.half(), k.half(), prompt


@pytest.mark.parametrize("per_group", [False, True])
@every_prompt
def test_scores_equal_plain_loops(sizes, per_group, by_lists):
    q, k, prompt = in_half(**sizes)
    scores = sp.get_estimator("token_by_mean", per_group=per_group)(q, k, prompt)
    want = reference.token_by_mean(q.float(), k.float(), prompt, per_group)
    torch.testing.assert_close(scores.double(), want, rtol=0.01, atol=1e-7)  # means are rounded to fp16


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tokens", [40, 200])
def test_the_real_flex_attention_gives_the_same_scores(tokens, on_a_gpu):
    q, k, prompt = in_half(q_len=tokens)
    scores = sp.get_estimator("token_by_mean")(q, k, prompt)
    want = reference.token_by_mean(q.float(), k.float(), prompt)
    torch.testing.assert_close(scores.double(), want, rtol=0.01, atol=1e-7)


@pytest.mark.parametrize("outputs", [1, 3 * 6 * 256 * 16])
@every_prompt
def test_scores_do_not_depend_on_the_number_of_query_blocks_per_call(sizes, outputs, by_lists, monkeypatch):
    q, k, prompt = in_half(**sizes)
    estimator = sp.get_estimator("token_by_mean")
    before = estimator(q, k, prompt)
    monkeypatch.setattr(token_sums, "MAX_OUTPUT_ELEMENTS", outputs)
    torch.testing.assert_close(estimator(q, k, prompt), before, rtol=1e-5, atol=1e-9)


def test_tiles_without_a_scoring_token_are_skipped(on_a_gpu, monkeypatch):
    listed = []

    def flex_attention(*args, block_mask, **options):
        listed.append((block_mask.kv_num_blocks, block_mask.full_kv_num_blocks))
        return log_sums_of_listed_blocks(*args, block_mask=block_mask, **options)

    monkeypatch.setattr(token_sums, "flex_attention", flex_attention)
    monkeypatch.setattr(token_sums, "MAX_OUTPUT_ELEMENTS", 100 * 384 * 16 * 2)
    q, k, prompt = in_half(q_len=16 * 300, heads=2, kv_heads=1)
    sp.get_estimator("token_by_mean")(q, k, prompt)
    (some, full), *_, last = listed
    assert [some.shape[0], *(counts[0].shape[0] for counts in listed[1:])] == [100, 100, 100]
    assert torch.equal(some.flatten(1), torch.tensor([[1, 0]]).expand(100, 2))
    assert not full.any()
    assert torch.equal(last[0][:, 0], torch.tensor([[0, 1, 0]] * 56 + [[0, 0, 1]] * 44))
    assert torch.equal(last[1][:, 0], torch.tensor([[1, 0, 0]] * 56 + [[1, 1, 0]] * 44))


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_values_beyond_the_range_of_fp16_are_clamped(scale, by_lists):
    q, k, prompt = inputs(q_len=80)
    scores = sp.get_estimator("token_by_mean")((q.abs() * scale).bfloat16(), k.abs().bfloat16(), prompt)
    assert scores.isfinite().all()
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, 6, 5))


def test_heads_of_fewer_than_16_dimensions_and_fp32_inputs_use_the_cpu_path(on_a_gpu, monkeypatch):
    monkeypatch.setattr(token_block, "token_shares", None)
    for q, k, prompt in (inputs(q_len=100, dim=8), inputs(q_len=100)):
        dtype = torch.float16 if q.shape[-1] == 8 else torch.float32
        q, k = q.to(dtype), k.to(dtype)
        scores = sp.get_estimator("token_by_mean")(q, k, prompt)
        torch.testing.assert_close(scores.double(), reference.token_by_mean(q, k, prompt), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("dim", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_tiles_divide_the_blocks(dim, block_size):
    tiles = token_sums._tiles(dim, block_size)
    assert token_sums.TILE_MEANS % tiles["BLOCK_M"] == block_size % tiles["BLOCK_N"] == 0


WHOLE = {
    "plain": {"q_len": 129},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "left padding": {"q_len": 150, "left_padding": [37, 0, 150]},
    "right padding": {"q_len": 150, "right_padding": [37, 0, 6]},
    "both": {"q_len": 150, "left_padding": [20, 0], "right_padding": [37, 150]},
    "window": {"q_len": 150, "window": 50},
    "padding and window": {"q_len": 150, "left_padding": [37, 0], "window": 20},
    "documents": {"q_len": 150, "documents": [0] * 70 + [1] * 5 + [2] * 75},
    "documents and window": {"q_len": 150, "documents": [0] * 70 + [1] * 80, "window": 40},
}


@pytest.mark.parametrize("sizes", WHOLE.values(), ids=WHOLE)
def test_whole_blocks_of_a_row_lie_in_its_document_and_end_at_or_before_it(sizes):
    prompt = sp.Prompt(block_size=16, **sizes)
    first, stop = prompt.whole_blocks()
    rows, keys = prompt.query_positions(), torch.arange(prompt.kv_len)
    allowed = prompt.may_attend(rows, keys)[:, 0]
    for b in range(prompt.batch):
        for row in range(prompt.q_len):
            blocks = [reference.key_block(prompt, j) for j in range(prompt.n_k)]
            ends = [allowed[b, row, block.stop - 1] for block in blocks]
            begins = [allowed[b, row, block.start] or prompt.documents is None for block in blocks]
            want = [j for j in range(prompt.n_k) if ends[j] and begins[j]]
            assert list(range(int(first[b, row]), int(stop[b, row]))) == want

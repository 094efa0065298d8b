"""Delta correction equals its formula for whole prompts, chunks and padded batches."""

import math

import pytest
import reference
import torch

import sparse_prefill as sp

A_SHAPE = {"name": "a_shape", "sink": 16, "local": 32, "block_size": 16, "min_length": 0}


def delta(**options):
    return sp.get_strategy("delta", of=A_SHAPE, **options)


def corrected(q, k, v, keep, prompt, every, mode):
    """Row by row: the last rows are dense, others are sparse plus the correction of the first row of their window."""
    sparse = reference.sparse_attention(q, k, v, keep, prompt)
    dense = reference.dense_attention(q, k, v, prompt)
    out = torch.zeros_like(sparse)
    offset = prompt.kv_len - prompt.q_len
    for b in range(q.shape[0]):
        start = reference.padding_of(prompt, b)
        tokens = prompt.kv_len - start
        end = tokens - (tokens % every + max(128, every))
        for row in range(prompt.q_len):
            position = row + offset - start
            if position < 0:
                continue
            first = max(position // every * every + start - offset, start - offset, 0)  # first row of the window
            if position >= end or row == first:
                out[b, :, row] = dense[b, :, row]
            else:
                correction = dense[b, :, first] - sparse[b, :, first] if mode == "correct" else 0
                out[b, :, row] = sparse[b, :, row] + correction
    return out


CASES = {
    "odd length": {"q_len": 301},
    "under the dense end": {"q_len": 120},
    "chunk at a window": {"q_len": 208, "kv_len": 304},
    "chunk inside a window": {"q_len": 201, "kv_len": 311},
    "left padding": {"q_len": 301, "padding": [37, 0]},
    "padded chunk": {"q_len": 201, "kv_len": 311, "padding": [130, 20]},
}


def case(q_len, kv_len=None, padding=None, dtype=torch.float32):
    qkv = reference.random_qkv(2, 4, 2, q_len, kv_len, scale=4, dtype=dtype)
    return qkv, sp.Prompt(q_len, kv_len or q_len, 16, left_padding=padding)


@pytest.mark.parametrize("mode", ["correct", "recompute"])
@pytest.mark.parametrize("every", [1, 16, 24, 64])
@pytest.mark.parametrize("situation", CASES)
def test_the_output_is_the_sparse_one_plus_the_correction_of_the_first_row_of_each_window(situation, every, mode):
    (q, k, v), prompt = case(**CASES[situation])
    strategy = delta(every=every, mode=mode)
    keep = strategy.keep(q, k, prompt)
    out = strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep)
    torch.testing.assert_close(out.double(), corrected(q, k, v, keep, prompt, every, mode), rtol=0, atol=1e-5)
    if every == 1:
        torch.testing.assert_close(out.double(), reference.dense_attention(q, k, v, prompt), rtol=0, atol=1e-5)


def test_dense_rows_are_exact_in_bf16_and_corrections_are_rounded_once():
    (q, k, v), prompt = case(301, dtype=torch.bfloat16)
    strategy = delta(every=16)
    out = sp.sparse_attention(q, k, v, strategy)
    want = corrected(q, k, v, strategy.keep(q, k), prompt, 16, "correct")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, rtol=0, atol=3e-2)
    dense = reference.dense_attention(q, k, v, prompt)
    torch.testing.assert_close(out[:, :, :160:16].double(), dense[:, :, :160:16], rtol=0, atol=2e-2)


def test_chunks_with_total_len_are_corrected_as_in_the_whole_prompt():
    (q, k, v), _ = case(512)
    strategy = delta(every=16)
    whole = sp.sparse_attention(q, k, v, strategy)
    for begin, stop in ((0, 256), (256, 400), (400, 512)):
        prompt = sp.Prompt(stop - begin, stop, 16, total_len=512)
        chunk = sp.sparse_attention(q[:, :, begin:stop], k[:, :, :stop], v[:, :, :stop], strategy, prompt=prompt)
        torch.testing.assert_close(chunk, whole[:, :, begin:stop], rtol=0, atol=1e-5)


def test_chunks_without_total_len_are_corrected_as_in_the_whole_prompt_up_to_their_dense_ends():
    (q, k, v), _ = case(512)
    strategy = delta(every=16)
    whole = sp.sparse_attention(q, k, v, strategy)
    compared = 0
    for begin, stop in ((0, 256), (256, 512)):
        chunk = sp.sparse_attention(q[:, :, begin:stop], k[:, :, :stop], v[:, :, :stop], strategy)
        rows = slice(0, stop - begin - 128)
        torch.testing.assert_close(chunk[:, :, rows], whole[:, :, begin : stop - 128], rtol=0, atol=1e-5)
        compared += rows.stop
    assert compared == 256


def test_the_output_does_not_depend_on_the_size_of_the_parts(monkeypatch):
    from sparse_prefill.wrappers import delta as module

    (q, k, v), _ = case(301)
    want = sp.sparse_attention(q, k, v, delta(every=16))
    monkeypatch.setattr(module, "LOGITS", 2 * 4 * 301 * 7)  # seven rows at once
    monkeypatch.setattr(module, "ROWS", 50)
    torch.testing.assert_close(sp.sparse_attention(q, k, v, delta(every=16)), want, rtol=1e-6, atol=1e-6)


def test_values_may_be_wider_than_keys_and_the_caller_may_set_the_scale():
    (q, k, v), prompt = case(301)
    wide = torch.cat([v, v], -1)
    out = sp.sparse_attention(q, k, wide, delta(every=16), scale=0.1)
    torch.testing.assert_close(out[..., :16], out[..., 16:])
    keep = delta().keep(q, k)
    want = corrected(q * 0.4, k, v, keep, prompt, 16, "correct")  # 0.1 divided by the default scale, 1 / 4
    torch.testing.assert_close(out[..., :16].double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["correct", "recompute"])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("which", "token"), [("q", 32), ("k", 101), ("v", 101), ("k", 390), ("v", 390)])
def test_a_nan_or_infinity_reaches_the_rows_that_may_attend_to_it_and_no_others(which, token, value, window, mode):
    q, k, v = reference.random_qkv(1, 4, 2, 400, scale=4)
    prompt, strategy = sp.Prompt(400, block_size=16, window=window), delta(every=16, mode=mode)
    clean = sp.sparse_attention(q, k, v, strategy, prompt=prompt)
    {"q": q, "k": k, "v": v}[which][0, 0, token, 0] = value
    out = sp.sparse_attention(q, k, v, strategy, prompt=prompt)
    uncorrected = sp.sparse_attention(q, k, v, strategy.of, prompt=prompt)
    assert torch.equal(out.isfinite(), uncorrected.isfinite())
    assert torch.equal(out[~out.isfinite()].nan_to_num(), uncorrected[~uncorrected.isfinite()].nan_to_num())
    assert 0 < (~out.isfinite()).sum() < out.numel()
    torch.testing.assert_close(out[:, :, :token], clean[:, :, :token], rtol=0, atol=1e-5)

    dense = reference.dense_attention(q, k, v.nan_to_num(posinf=0), prompt)[:, :, :240:16]
    finite = out[:, :, :240:16].isfinite()  # only rows that are computed densely
    torch.testing.assert_close(out[:, :, :240:16].double()[finite], dense[finite], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number, 1 or more"),
        ({"every": 1.5}, "every must be"),
        ({"mode": "replace"}, "mode must be one of correct, recompute"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        delta(**options)


def test_the_windows_of_each_document_start_at_its_first_token():
    q, k, v = reference.random_qkv(2, 4, 2, 501, scale=4)
    prompt = sp.Prompt(501, block_size=16, documents=[0] * 200 + [1] * 301)
    out = sp.sparse_attention(q, k, v, delta(every=16), prompt=prompt)
    for tokens in (slice(0, 200), slice(200, 501)):
        document = [x[:, :, tokens] for x in (q, k, v)]
        want = sp.sparse_attention(*document, delta(every=16))
        torch.testing.assert_close(out[:, :, tokens], want, rtol=0, atol=1e-5)

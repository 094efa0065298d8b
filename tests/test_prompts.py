"""Every strategy on padded, packed, chunked and windowed prompts, with soft caps and sinks."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_strategies import NAMES, SPARSE, TOLERANCE, small

import sparse_prefill as sp
from sparse_prefill.core import key_blocks
from sparse_prefill.evaluation import density

every_strategy = pytest.mark.parametrize("name", NAMES)
INVARIANT = [name for name in SPARSE if small(name).chunk_invariant]


def separate_outputs(strategy, qkv, prompt):
    """The outputs of separate calls for each prompt, zeros elsewhere, and the number of heads with skipped blocks."""
    q, k, v = qkv
    out, skipped = torch.zeros_like(q), 0
    for b in range(q.shape[0]):
        for begin, end in reference.spans(prompt, b):
            first = max(begin, prompt.offset)
            if first < end:
                rows, keys = slice(first - prompt.offset, end - prompt.offset), slice(begin, end)
                own = q[b : b + 1, :, rows], k[b : b + 1, :, keys], v[b : b + 1, :, keys]
                shape = sp.Prompt(end - first, end - begin, 16, window=prompt.window)
                with sp.record() as calls:
                    out[b : b + 1, :, rows] = sp.sparse_attention(*own, strategy, prompt=shape)
                skipped += int((calls[0].density < 1).sum())
    return out, skipped


SHAPES = {
    "left padding": {"left_padding": [37, 0, 149, 150]},
    "right padding": {"right_padding": [37, 0, 149, 150]},
    "padding on both sides": {"left_padding": [5, 20], "right_padding": [20, 16]},
    "documents": {"documents": [[0] * 70 + [1] * 5 + [2] * 75, [3] * 150]},
    "window": {"window": 70},
    "window and documents": {"window": 40, "documents": [0] * 70 + [1] * 80},
    "window and padding": {"window": 40, "left_padding": [60, 3]},
}


@pytest.mark.parametrize("chunk", [150, 61], ids=["whole", "chunk"])
@pytest.mark.parametrize("shape", SHAPES)
@every_strategy
def test_each_row_and_each_document_equals_a_separate_prompt(name, shape, chunk):
    prompt = sp.Prompt(chunk, 150, 16, **SHAPES[shape])
    q, k, v = reference.random_qkv(max(prompt.batch, 2), 4, 2, chunk, 150, scale=4)
    strategy = small(name)
    want, skipped = separate_outputs(strategy, (q, k, v), prompt)
    out = sp.sparse_attention(q, k, v, strategy, prompt=prompt)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    if skipped:
        assert (out - reference.dense_attention(q, k, v, prompt)).abs().max() > 1e-3


@pytest.mark.parametrize("shape", ["padding on both sides", "documents", "window and padding"])
@every_strategy
def test_invisible_keys_do_not_change_the_output(name, shape):
    prompt = sp.Prompt(150, 150, 16, **SHAPES[shape])
    batch = max(prompt.batch, 2)
    q, k, v = reference.random_qkv(batch, 4, 2, 150, scale=4)
    strategy = small(name)
    before = sp.sparse_attention(q, k, v, strategy, prompt=prompt)
    changed = [x.clone() for x in (q, k, v)]
    for b in range(batch):
        first, last = reference.spans(prompt, b)[-1]  # for documents, the last one
        for x in changed:
            x[b, :, :first], x[b, :, last:] = 1e4, 1e4
    after = sp.sparse_attention(*changed, strategy, prompt=prompt)
    for b in range(batch):
        first, last = reference.spans(prompt, b)[-1]
        assert torch.equal(after[b, :, first:last], before[b, :, first:last])


@every_strategy
def test_windows_are_applied_and_short_ones_run_dense(name):
    q, k, v = reference.random_qkv(2, 4, 2, 150, scale=4)
    prompt = sp.Prompt(150, block_size=16, window=50)
    out = sp.sparse_attention(q, k, v, small(name), prompt=prompt)
    far = [x.clone() for x in (k, v)]
    for x in far:
        x[:, :, :20] = 1e4
    rows = slice(69, None)  # row 68 is the last one that sees token 19
    keep = small(name).keep(q, k, prompt)
    assert not (keep & ~reference.visible(prompt)).any()
    torch.testing.assert_close(out.double(), reference.sparse_attention(q, k, v, keep, prompt), rtol=0, atol=1e-5)
    attended = sp.block_sparse_attention(q, *far, keep, prompt=prompt)
    assert torch.equal(attended[:, :, rows], out[:, :, rows])
    with sp.record() as calls:
        exact = sp.sparse_attention(q, k, v, small(name, min_length=51), prompt=prompt)
    assert calls[0].dense == ("strategy" if name == "dense" else "min_length")
    torch.testing.assert_close(exact.double(), reference.dense_attention(q, k, v, prompt), rtol=0, atol=1e-5)


# Chunks and cached statistics -----------------------------------------------------------------------------


def in_chunks(q, k, v, strategy, ends, state=None, **shape):
    parts = []
    for begin, end in pairwise([0, *ends]):
        prompt = sp.Prompt(end - begin, end, strategy.block_size, total_len=ends[-1], **shape)
        part = q[:, :, begin:end], k[:, :, :end], v[:, :, :end]
        parts.append(sp.sparse_attention(*part, strategy, prompt=prompt, state=state))
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("name", INVARIANT)
def test_chunks_of_whole_blocks_equal_the_prompt_in_one_piece(name):
    q, k, v = reference.random_qkv(2, 4, 2, 333, scale=4)
    strategy = small(name, last=0) if "last" in sp.registry.strategies.options(name) else small(name)
    whole = sp.sparse_attention(q, k, v, strategy)
    for state in (None, sp.KeyState()):
        out = in_chunks(q, k, v, strategy, [64, 80, 208, 333], state)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ends", [[333], [1, 2, 333], [100, 177, 333], [16, 332, 333]])
def test_dense_chunks_equal_the_prompt_in_one_piece(ends):
    q, k, v = reference.random_qkv(2, 4, 2, 333, scale=4)
    whole = sp.sparse_attention(q, k, v, "dense")
    torch.testing.assert_close(in_chunks(q, k, v, small("dense"), ends), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ends", [[64, 80, 208, 333], [33, 40, 41, 177, 333]], ids=["whole blocks", "any ends"])
@every_strategy
def test_cached_statistics_do_not_change_the_output(name, ends):
    q, k, v = reference.random_qkv(2, 4, 2, 333, scale=4)
    strategy = small(name)
    want = in_chunks(q, k, v, strategy, ends)
    assert torch.equal(in_chunks(q, k, v, strategy, ends, sp.KeyState()), want)


@pytest.mark.parametrize("of", ["mean_pool", "flash_prefill"])
@pytest.mark.parametrize("name", [n for n in sp.list_wrappers() if n != "layer_schedule"])
def test_cached_statistics_do_not_change_the_output_of_wrappers(name, of):
    q, k, v = reference.random_qkv(2, 4, 2, 333, scale=4)
    strategy = sp.get_strategy(name, of=small(of), **({"heads": {1: small("moba")}} if name == "by_head" else {}))
    want = in_chunks(q, k, v, strategy, [64, 100, 333])
    assert torch.equal(in_chunks(q, k, v, strategy, [64, 100, 333], sp.KeyState()), want)


@pytest.fixture
def computed(monkeypatch):
    """Name and number of tokens of each computed mean of key blocks."""
    found = []

    def count(name, x, prompt, compute):
        def counted(part):
            found.append((name, part.shape[2]))
            return compute(part)

        return original(name, x, prompt, counted)

    original = key_blocks.of_key_blocks
    monkeypatch.setattr("sparse_prefill.estimators.block_means.of_key_blocks", count)
    return found


def test_statistics_of_earlier_blocks_are_not_computed_again(computed):
    q, k, v = reference.random_qkv(1, 4, 2, 320, scale=4)
    in_chunks(q, k, v, small("flash_prefill"), [64, 128, 200, 320], sp.KeyState())
    assert [tokens for _, tokens in computed] == [64, 64, 72, 128]  # 72: the ragged block is computed again


def test_parts_of_a_strategy_share_statistics_only_within_a_call(computed):
    q, k, v = reference.random_qkv(1, 4, 2, 320, scale=4)
    strategy = sp.get_strategy("mean_correction", of=small("flash_prefill"))
    state = sp.KeyState()
    first = sp.sparse_attention(q, k, v, strategy, state=state)
    assert computed == [("key means", 320), ("value means", 320)]
    k *= -1
    assert not torch.equal(sp.sparse_attention(q, k, v, strategy, state=state), first)
    assert computed[2:] == [("key means", 320), ("value means", 320)]


def test_statistics_of_different_heads_are_cached_separately():
    @dataclass(frozen=True, kw_only=True)
    class HeadByHead(sp.Strategy):
        def score(self, q, k, prompt):
            means = [small("mean_pool").score(q[:, h : h + 2], k[:, h // 2 : h // 2 + 1], prompt) for h in (0, 2)]
            return torch.cat(means, dim=1)

        def select(self, scores, prompt):
            return small("mean_pool").select(scores, prompt)

    q, k, v = reference.random_qkv(1, 4, 2, 333, scale=4)
    strategy = HeadByHead(block_size=16, min_length=0)
    for prompt in (sp.Prompt(333, block_size=16), sp.Prompt(100, 333, 16)):
        part = q[:, :, -prompt.q_len :]
        with sp.record() as calls:
            sp.sparse_attention(part, k, v, strategy, prompt=prompt)
        keep = strategy.keep(part, k, prompt)
        torch.testing.assert_close(calls[0].density.flatten(), density(keep, prompt).flatten())


def test_a_new_prompt_and_a_shortened_one_reset_the_statistics():
    state, strategy = sp.KeyState(), small("mean_pool")
    q, k, v = reference.random_qkv(1, 4, 2, 320, scale=4)
    in_chunks(q, k, v, strategy, [160, 320], state)
    other = reference.random_qkv(1, 4, 2, 320, scale=4, seed=1)
    want = in_chunks(*other, strategy, [160, 320])
    assert torch.equal(in_chunks(*other, strategy, [160, 320], state), want)
    k[:, :, 200:] *= -1  # the cache is overwritten after token 200
    prompt = sp.Prompt(120, 320, 16)
    changed = [torch.cat([a[:, :, :200], b[:, :, 200:]], 2) for a, b in zip(other[1:], (k, v), strict=True)]
    want = sp.sparse_attention(q[:, :, 200:], *changed, strategy, prompt=prompt)
    assert torch.equal(sp.sparse_attention(q[:, :, 200:], *changed, strategy, prompt=prompt, state=state), want)


def test_rows_and_documents_have_separate_statistics():
    q, k, v = reference.random_qkv(2, 4, 2, 320, scale=4)
    padding = {"left_padding": [40, 3]}
    want = in_chunks(q, k, v, small("mean_pool"), [64, 160, 320], **padding)
    assert torch.equal(in_chunks(q, k, v, small("mean_pool"), [64, 160, 320], sp.KeyState(), **padding), want)
    state, ids = sp.KeyState(), [0] * 130 + [1] * 190
    for begin, end in ((0, 160), (160, 320)):
        prompt = sp.Prompt(end - begin, end, 16, documents=ids[:end])
        part = q[:, :, begin:end], k[:, :, :end], v[:, :, :end]
        want = sp.sparse_attention(*part, small("mean_pool"), prompt=prompt)
        assert torch.equal(sp.sparse_attention(*part, small("mean_pool"), prompt=prompt, state=state), want)


# Soft cap and sinks ---------------------------------------------------------------------------------------


def modified(q, k, v, mask, scale=None, softcap=None, sinks=None):
    """Attention under a token mask, head by head in float64."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            logits = q[b, h].double() @ k[b, h // group].double().T * (scale or q.shape[-1] ** -0.5)
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            logits = logits.masked_fill(~mask[b, h], -torch.inf)
            sink = torch.full((len(logits), 1), -torch.inf) if sinks is None else sinks[h].expand(len(logits), 1)
            shares = torch.cat([logits, sink.double()], -1).softmax(-1)[:, :-1].nan_to_num(0)
            out[b, h] = shares @ v[b, h // group].double()
    return out


MODIFIERS = {
    "soft cap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 8.0])},
    "all": {"softcap": 5.0, "sinks": torch.tensor([0.5, -1.0, 3.0, 8.0]), "scale": 0.5},
}


@pytest.mark.parametrize("modifiers", MODIFIERS)
@pytest.mark.parametrize(
    "shape",
    [
        {"q_len": 150},
        {"q_len": 61, "kv_len": 150},
        {"q_len": 150, "window": 40},
        {"q_len": 150, "left_padding": [40, 3]},
        {"q_len": 150, "right_padding": [40, 3]},
        {"q_len": 1, "kv_len": 150},
        {"q_len": 1, "kv_len": 150, "left_padding": [40, 150]},
        {"q_len": 9, "kv_len": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["a_shape", "mean_pool", "dense"])
def test_soft_cap_and_sinks_are_applied(name, shape, modifiers):
    prompt = sp.Prompt(block_size=16, **shape)
    q, k, v = reference.random_qkv(2, 4, 2, prompt.q_len, prompt.kv_len, scale=4)
    options, strategy = MODIFIERS[modifiers], small(name)
    out = sp.sparse_attention(q, k, v, strategy, prompt=prompt, **options)
    mask = torch.zeros(2, 4, prompt.q_len, prompt.kv_len, dtype=torch.bool)
    for rows, queries, keys, own in prompt.split_sequences():
        scored = q[rows, :, queries] * (options["scale"] * 4 if "scale" in options else 1)
        keep = strategy.keep(scored, k[rows, :, keys], own)
        keep = own.visible() if strategy.dense_reason(own) else keep
        tokens = keep.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, : own.q_len, : own.kv_len]
        mask[rows, :, queries, keys] = tokens & reference.token_mask(own)[:, None]
    torch.testing.assert_close(out.double(), modified(q, k, v, mask, **options), rtol=0, atol=1e-5)


def test_delta_corrects_with_cap_and_sinks():
    q, k, v = reference.random_qkv(1, 4, 2, 150, scale=4)
    strategy = sp.get_strategy("delta", of=small("a_shape"), every=1)
    out = sp.sparse_attention(q, k, v, strategy, **MODIFIERS["all"])
    mask = reference.token_mask(sp.Prompt(150))[:, None].expand(-1, 4, -1, -1)
    torch.testing.assert_close(out.double(), modified(q, k, v, mask, **MODIFIERS["all"]), rtol=0, atol=1e-5)


def test_changed_values_of_caps_and_sinks_compile_nothing():
    q, k, v = reference.random_qkv(1, 4, 2, 150, scale=4)
    for step in range(4):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        sinks = torch.arange(4.0) * step
        sp.sparse_attention(q[:, :, step:], k[:, :, step:], v[:, :, step:], small("a_shape"), sinks=sinks)
        sp.sparse_attention(q[:, :, step:], k[:, :, step:], v[:, :, step:], small("a_shape"), softcap=3.0 + step)
        if step > 1:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "softcap must be a positive number"),
        ({"softcap": float("nan")}, "softcap must be a positive number"),
        ({"sinks": torch.zeros(3)}, "sinks must be 4 logits on cpu, one for each query head, got 3"),
        ({"sinks": 1.0}, "sinks must be a tensor of one logit per query head"),
    ],
)
def test_invalid_logit_options_are_refused(options, message):
    q, k, v = reference.random_qkv(1, 4, 2, 150)
    with pytest.raises(ValueError, match=message):
        sp.sparse_attention(q, k, v, "a_shape", **options)


# Everything at once ---------------------------------------------------------------------------------------


@st.composite
def situations(draw):
    kv_len = draw(st.sampled_from([1, 17, 63, 100, 127]))  # all have one size of the kernel's look-up table
    q_len = draw(st.sampled_from([kv_len, max(1, kv_len // 3), 1]))
    shape = {"window": draw(st.sampled_from([None, 1, 20, 100]))}
    kind = draw(st.sampled_from(["plain", "left", "right", "both", "documents"]))
    left = [draw(st.integers(0, kv_len)) for _ in range(2)]
    if kind in ("left", "both"):
        shape["left_padding"] = left
    if kind in ("right", "both"):
        shape["right_padding"] = [draw(st.integers(0, kv_len - (pad if kind == "both" else 0))) for pad in left]
    if kind == "documents":
        cuts = [sorted(draw(st.lists(st.integers(0, 3), min_size=kv_len, max_size=kv_len))) for _ in range(2)]
        shape["documents"] = cuts
    return sp.Prompt(q_len, kv_len, 16, **shape), draw(st.sampled_from([torch.float32, torch.bfloat16]))


@given(situation=situations(), name=st.sampled_from(NAMES))
def test_output_for_any_prompt_equals_the_reference(situation, name):
    prompt, dtype = situation
    q, k, v = reference.random_qkv(2, 4, 2, prompt.q_len, prompt.kv_len, scale=4, dtype=dtype)
    strategy = small(name)
    out = sp.sparse_attention(q, k, v, strategy, prompt=prompt)
    if prompt.q_len == 1:
        want = reference.dense_attention(q, k, v, prompt)
    else:
        want, _ = reference.sparse_by_pieces(q, k, v, strategy, prompt)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), want, rtol=0, atol=TOLERANCE[dtype])


@given(situation=situations(), name=st.sampled_from(NAMES), share=st.floats(0.1, 0.9))
def test_later_tokens_do_not_change_earlier_rows_for_a_fixed_table(situation, name, share):
    prompt, _ = situation
    q, k, v = reference.random_qkv(2, 4, 2, prompt.q_len, prompt.kv_len, scale=4)
    strategy = small(name)
    at = int(share * prompt.q_len)
    for rows, queries, keys, own in prompt.split_sequences():
        if strategy.dense_reason(own):
            continue
        part = q[rows, :, queries], k[rows, :, keys], v[rows, :, keys]
        keep = strategy.keep(*part[:2], own)
        before = sp.block_sparse_attention(*part, keep, prompt=own)
        row = min(at, own.q_len)
        later = [x.clone() for x in part]
        later[0][:, :, row:] = -7
        for x in later[1:]:
            x[:, :, own.offset + row :] = -7
        after = sp.block_sparse_attention(*later, keep, prompt=own)
        assert torch.equal(before[:, :, :row], after[:, :, :row])


def test_a_table_for_right_padding_is_refused():
    q, k, _ = reference.random_qkv(2, 4, 2, 150)
    with pytest.raises(ValueError, match="right_padding: select for each of"):
        small("a_shape").keep(q, k, sp.Prompt(150, block_size=16, right_padding=[3, 4]))

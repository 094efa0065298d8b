"""XAttention equals a version in plain loops, and has the properties that its docstring states."""

import itertools
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp


def xattention(size=16, **options):
    return sp.get_strategy("xattention", block_size=size, min_length=0, **options)


def antidiagonal(stride=8, **options):
    return sp.get_estimator("antidiagonal", stride=stride, **options)


def inputs(padding=None, scale=3.0, size=16, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], size, left_padding=padding)


# Against plain loops --------------------------------------------------------------------------------------


def tile_scores(q, k, prompt, stride):
    """Block scores by the formulas in float64: the sums of the paper, and the means of this library."""
    batch, heads, _, dim = q.shape
    group, offset, tiles = heads // k.shape[1], prompt.offset, prompt.block_size // stride
    paper = torch.zeros(batch, heads, prompt.n_q, prompt.n_k, dtype=torch.float64)
    ours = torch.zeros_like(paper)
    for b, h in itertools.product(range(batch), range(heads)):
        start = reference.padding_of(prompt, b)
        queries = {offset + i: x for i, x in enumerate(q[b, h].double()) if offset + i >= start}
        keys = {j: x for j, x in enumerate(k[b, h // group].double()) if j >= start}
        for block in range(prompt.n_q):
            counted = 0
            for tile in range(block * tiles, (block + 1) * tiles):
                rows = range(offset + tile * stride, offset + tile * stride + stride)
                if not any(row in queries for row in rows):
                    continue
                logits = {}
                for column in range(-(-prompt.kv_len // stride)):
                    cols = range(column * stride, column * stride + stride)
                    if any(r in queries and c in keys and c <= r for r in rows for c in cols):
                        pairs = [(rows[-1 - s], cols[s]) for s in range(stride)]
                        met = [queries[r] @ keys[c] for r, c in pairs if r in queries and c in keys]
                        logits[column] = float(sum(met)) / (math.sqrt(dim) * stride)
                counted += 1
                most = max(logits.values())
                total = sum(math.exp(x - most) for x in logits.values())
                for column, x in logits.items():
                    paper[b, h, block, column // tiles] += math.exp(x - most) / total
            ours[b, h, block] = paper[b, h, block] / max(counted, 1)
    return paper, ours


PROMPTS = {
    "a token": {"q_len": 1},
    "63": {"q_len": 63},
    "127, no groups": {"q_len": 127, "heads": 2, "kv_heads": 2},
    "129, blocks of 32": {"q_len": 129, "heads": 2, "kv_heads": 1, "size": 32},
    "450": {"q_len": 450, "heads": 2, "kv_heads": 1, "size": 64},
    "batch": {"q_len": 96, "batch": 2, "heads": 4, "kv_heads": 2},
    "chunk": {"q_len": 48, "kv_len": 160, "heads": 4, "kv_heads": 1},
    "chunk off the block grid": {"q_len": 40, "kv_len": 144, "heads": 2, "kv_heads": 1},
    "chunk off the tile grid": {"q_len": 41, "kv_len": 150, "heads": 2, "kv_heads": 1},
    "chunk under a tile": {"q_len": 3, "kv_len": 150, "heads": 2, "kv_heads": 1},
    "padding": {"q_len": 100, "batch": 2, "heads": 2, "kv_heads": 1, "padding": [37, 0]},
    "padded chunk": {"q_len": 41, "kv_len": 150, "batch": 3, "heads": 2, "kv_heads": 1, "padding": [120, 13, 150]},
}
every_prompt = pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)


@pytest.mark.parametrize("stride", [4, 8, 16])
@every_prompt
def test_scores_equal_plain_loops(sizes, stride):
    q, k, prompt = inputs(**sizes)
    _, want = tile_scores(q, k, prompt, stride)
    torch.testing.assert_close(antidiagonal(stride)(q, k, prompt).double(), want, rtol=0, atol=1e-6)


def kept_of_row(row, own, first, threshold):
    """The forced blocks, and the highest others until all hold the threshold."""
    kept = {j for j in range(len(row)) if own[j] or j == first}
    if threshold == 1:
        return {j for j in range(first, len(row)) if row[j] > 0} | kept
    for j in sorted(set(range(len(row))) - kept, key=lambda j: (-row[j], j)):
        if sum(row[i] for i in kept) >= threshold * sum(row) or row[j] == 0:
            break
        kept.add(j)
    return kept


@pytest.mark.parametrize("threshold", [0.5, 0.9])
@every_prompt
def test_selection_equals_plain_loops(sizes, threshold):
    q, k, prompt = inputs(**sizes)
    _, scores = tile_scores(q, k, prompt, 8)
    keep = xattention(prompt.block_size, threshold=threshold).keep(q, k, prompt)
    own = reference.diagonal(prompt, len(q))
    for b, h, i in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        first = reference.padding_of(prompt, b) // prompt.block_size
        want = kept_of_row(scores[b, h, i].tolist(), own[b, 0, i], first, threshold) if own[b, 0, i].any() else set()
        assert set(keep[b, h, i].nonzero()[:, 0].tolist()) == want


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("sizes", [sizes for sizes in PROMPTS.values() if not sizes.keys() & {"kv_len", "padding"}])
def test_official_selection_equals_the_published_steps_in_plain_loops(sizes, threshold):
    q, k, prompt = inputs(**sizes)
    scores, _ = tile_scores(q, k, prompt, 8)
    keep = xattention(prompt.block_size, threshold=threshold, official=True).keep(q, k)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        row = scores[b, h, i].tolist()
        others = sorted(set(range(i)), key=lambda j: (-row[j], j))
        kept = {0, i, *others[:1]}
        for p in range(2, len(others) + 1):
            if row[i] + sum(row[j] for j in others[: p - 2]) < threshold * sum(row):
                kept.add(others[p - 1])
        assert set(keep[b, h, i].nonzero()[:, 0].tolist()) == kept


# Properties -----------------------------------------------------------------------------------------------

SITUATIONS = {
    "tokens": st.sampled_from([16, 40, 129, 200, 333]),
    "scale": st.sampled_from([0.1, 1.0, 5.0, 20.0]),
    "stride": st.sampled_from([4, 8, 16]),
    "seed": st.integers(0, 9),
}


@given(**SITUATIONS)
def test_rows_sum_to_one_over_the_visible_blocks(tokens, scale, stride, seed):
    q, k, prompt = inputs(q_len=tokens, scale=scale, seed=seed)
    scores = antidiagonal(stride)(q, k, prompt)
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, 6, prompt.n_q), rtol=0, atol=1e-5)
    assert (scores >= 0).all()
    assert (scores[~prompt.visible().expand_as(scores)] == 0).all()


@given(threshold=st.sampled_from([0.0, 0.3, 0.8, 0.95]), **SITUATIONS)
def test_the_threshold_is_reached_with_the_fewest_blocks(threshold, tokens, scale, stride, seed):
    q, k, prompt = inputs(q_len=tokens, scale=scale, seed=seed)
    scores = antidiagonal(stride)(q, k, prompt)
    keep = xattention(stride=stride, threshold=threshold).keep(q, k)
    held = (scores * keep).sum(-1)
    assert (held >= threshold - 1e-5).all()
    free = keep & ~prompt.diagonal() & ~prompt.sink_blocks(1)
    least = scores.masked_fill(~free, torch.inf).amin(-1)
    assert ((held - least < threshold + 1e-5) | ~free.any(-1)).all()


@given(**SITUATIONS)
def test_a_higher_threshold_keeps_a_superset(tokens, scale, stride, seed):
    q, k, _ = inputs(q_len=tokens, scale=scale, seed=seed)
    keeps = [xattention(stride=stride, threshold=t).keep(q, k) for t in (0, 0.4, 0.8, 0.99, 1)]
    for fewer, more in itertools.pairwise(keeps):
        assert (more | ~fewer).all()


@pytest.mark.parametrize("scale", [1, 200])  # 200: the scores of some blocks underflow
def test_a_threshold_of_zero_keeps_the_first_and_the_own_blocks_and_one_keeps_all_blocks(scale):
    q, k, prompt = inputs(q_len=333, scale=scale)
    seen = prompt.visible().expand(1, 6, -1, -1)
    least = (prompt.sink_blocks(1) | prompt.diagonal()) & seen
    assert torch.equal(xattention(threshold=0).keep(q, k), least)
    assert torch.equal(xattention(threshold=1).keep(q, k), seen)


@given(chunk=st.sampled_from([1, 2, 7, 100]), tokens=st.sampled_from([40, 256, 333]))
def test_scores_do_not_depend_on_how_many_blocks_are_computed_at_once(chunk, tokens):
    q, k, prompt = inputs(q_len=tokens)
    torch.testing.assert_close(antidiagonal(chunk=chunk)(q, k, prompt), antidiagonal()(q, k, prompt), rtol=0, atol=1e-6)


@given(blocks=st.integers(1, 8), stride=st.sampled_from([4, 8, 16]))
def test_scores_do_not_depend_on_the_amount_or_the_values_of_padding(blocks, stride):
    q, k, prompt = inputs(q_len=150, heads=2, kv_heads=1)
    unpadded = antidiagonal(stride)(q, k, prompt)
    padding = torch.full((1, 1, 16 * blocks, 16), torch.nan)
    q, k = torch.cat([padding.expand(1, 2, -1, -1), q], 2), torch.cat([padding, k], 2)
    scores = antidiagonal(stride)(q, k, sp.Prompt(q.shape[2], block_size=16, left_padding=[16 * blocks]))
    torch.testing.assert_close(scores[..., blocks:, blocks:], unpadded, rtol=0, atol=1e-6)
    assert not scores[..., :blocks, :].any()
    assert not scores[..., :blocks].any()


def test_scores_of_repeated_tokens_equal_the_attention_between_the_original_tokens():
    q, k, _ = inputs(q_len=40, heads=2, kv_heads=1)
    wide = q.repeat_interleave(8, 2), k.repeat_interleave(8, 2)
    scores = antidiagonal(8)(*wide, sp.Prompt(q_len=320, block_size=128))
    want = reference.block_mass(q, k, sp.Prompt(q_len=40, block_size=16))
    torch.testing.assert_close(scores.double(), want, rtol=0, atol=1e-6)


@given(chunk=st.sampled_from([16, 61, 144, 205]), stride=st.sampled_from([4, 8, 16]))
def test_a_chunk_that_begins_on_the_grid_selects_the_last_rows_of_the_whole_prompt(chunk, stride):
    # The chunk may end off the grid.
    tokens = 128 + chunk
    q, k, prompt = inputs(q_len=tokens, heads=2, kv_heads=1)
    chunk_prompt = sp.Prompt(chunk, tokens, block_size=16)
    whole, part = antidiagonal(stride)(q, k, prompt), antidiagonal(stride)(q[:, :, 128:], k, chunk_prompt)
    torch.testing.assert_close(part, whole[:, :, 8:], rtol=0, atol=1e-6)
    strategy = xattention(stride=stride)
    assert torch.equal(strategy.keep(q[:, :, 128:], k, chunk_prompt), strategy.keep(q, k)[:, :, 8:])


def test_later_blocks_do_not_change_earlier_rows():
    q, k, _ = inputs(q_len=320)
    assert torch.equal(xattention().keep(q[:, :, :160], k[:, :, :160]), xattention().keep(q, k)[:, :, :10, :10])


def test_each_head_may_have_a_separate_threshold():
    q, k, _ = inputs(q_len=333, heads=4, kv_heads=2)
    each = (0.3, 0.9, 1.0, 0.0)
    for official in (False, True):
        keep = xattention(threshold=each, official=official).keep(q, k)
        for h, threshold in enumerate(each):
            one = xattention(threshold=threshold, official=official).keep(q, k)
            assert torch.equal(keep[:, h], one[:, h])
    assert xattention(threshold=list(each)) == xattention(threshold=each)


def test_without_a_sink_the_first_block_is_kept_only_for_its_score():
    q, k, _ = inputs(q_len=333)
    keep, with_sink = xattention(sink=0, threshold=0.5).keep(q, k), xattention(threshold=0.5).keep(q, k)
    assert with_sink[..., 0].all()
    assert not keep[..., 0].all()


# Faults of the released code ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [256, 512, 1024])
def test_lengths_that_are_a_power_of_two_keep_early_blocks(tokens):
    # Every query attends to early keys, which a mask that drops early blocks would lose.
    q, k, _ = inputs(q_len=tokens, heads=1, kv_heads=1, scale=0.1)
    q[..., 0], k[..., 0] = 6, 0
    k[:, :, 40:56, 0] = 20
    keep = xattention().keep(q, k)[0, 0]
    assert keep[4:, 2:4].any(-1).all()
    assert antidiagonal()(q, k, sp.Prompt(tokens, block_size=16))[0, 0, -1, 2:4].sum() > 0.9


def test_the_sink_marks_a_column_and_not_a_row():
    q, k, _ = inputs(q_len=333, scale=20)
    keep = xattention(threshold=0).keep(q, k)
    assert keep[..., 0].all()
    assert (keep[..., 0, :].sum(-1) == 1).all()


def test_the_released_code_keeps_more_than_the_fewest_blocks():
    q, k, _ = inputs(q_len=512)
    fewest, released = xattention().keep(q, k), xattention(official=True).keep(q, k)
    assert (released.sum(-1) >= fewest.sum(-1)).all()
    assert released.sum() > 1.05 * fewest.sum()


# Invalid input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [0, 2, 6, 32, 8.0, True, "8"])
def test_strides_other_than_four_eight_and_sixteen_are_refused(stride):
    for make in (xattention, antidiagonal):
        with pytest.raises(ValueError, match="stride must be"):
            make(stride=stride)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan, True, "0.9", None, (), (0.9, 2), (0.9, "x")])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(ValueError, match=r"threshold must be a number in \[0, 1\]"):
        xattention(threshold=threshold)


def test_chunks_and_the_official_flag_are_checked():
    with pytest.raises(ValueError, match="chunk must be a whole number"):
        antidiagonal(chunk=0)
    with pytest.raises(ValueError, match="official must be True or False"):
        xattention(official=1)


def test_a_number_of_thresholds_that_differs_from_the_number_of_heads_is_refused():
    q, k, _ = inputs(q_len=100)
    with pytest.raises(ValueError, match="threshold has 2 numbers and q has 6 heads"):
        xattention(threshold=(0.8, 0.9)).keep(q, k)


@pytest.mark.parametrize("official", [False, True])
def test_documents_are_refused(official):
    q, k, _ = inputs(q_len=150)
    prompt = sp.Prompt(q_len=150, block_size=16, documents=[0] * 70 + [1] * 80)
    with pytest.raises(ValueError, match=r"cannot make one table for packed documents.*split_sequences"):
        xattention(official=official).keep(q, k, prompt)


@pytest.mark.parametrize(
    "sizes",
    [PROMPTS["chunk"], PROMPTS["padding"], {"q_len": 16385, "heads": 1, "kv_heads": 1}],
    ids=["chunk", "padding", "more than a chunk of the released code"],
)
def test_official_selection_refuses_prompts_that_the_released_code_treats_differently(sizes):
    q, k, prompt = inputs(**sizes)
    with pytest.raises(ValueError, match="drop official=True for chunks, prefixes, padding and longer prompts"):
        xattention(official=True).keep(q, k, prompt)

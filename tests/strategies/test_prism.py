"""Prism equals its formulas in plain loops in both layouts of the rotary embedding, and has documented properties."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.estimators import SpectralBands

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "127": {"q_len": 127},
    "a token after whole blocks": {"q_len": 129},
    "300": {"q_len": 300, "heads": 4, "kv_heads": 1},
    "batch, no groups": {"q_len": 100, "batch": 2, "heads": 4, "kv_heads": 4},
    "chunk": {"q_len": 64, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
    "padded chunk": {"q_len": 41, "kv_len": 205, "batch": 2, "heads": 4, "left_padding": [20, 170]},
    "all padding": {"q_len": 64, "batch": 2, "heads": 2, "left_padding": [64, 3]},
}
LAYOUTS = {
    "half-split": {},
    "interleaved": {"rope": "interleaved"},
    "half-split in part": {"rope": "half_split", "rotated": 10},
    "interleaved in part": {"rope": "interleaved", "rotated": 6, "high": 2, "low": 6},
}
every_prompt = pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
a_seed = st.integers(0, 99)


def prism(share=0.9, **options):
    return sp.get_strategy("prism", **{"sink": 0, "share": share, "block_size": 16, **options})


def inputs(left_padding=None, scale=30.0, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding)


def band_dims(dim, rope="half_split", rotated=None, high=None, low=None):
    """Dimensions of the high band and of the low band, pair by pair."""
    rotated = dim if rotated is None else rotated
    pairs = [(i, i + rotated // 2) if rope == "half_split" else (2 * i, 2 * i + 1) for i in range(rotated // 2)]
    n_high = rotated // 4 if high is None else high // 2
    n_low = 3 * rotated // 8 if low is None else low // 2
    slow = [d for pair in pairs[len(pairs) - n_low :] for d in pair] + list(range(rotated, dim))
    return [d for pair in pairs[:n_high] for d in pair], slow


def rms(x):
    return math.sqrt(float(x.square().mean()))


def bands(q, k, prompt, layout):
    """The pooled attention of each band, with RMS and temperature as published: float64 [B, Hq, n_q, n_k]."""
    q_means, k_means = reference.block_means(q, prompt, True), reference.block_means(k, prompt, False)
    seen, dim, group = reference.visible(prompt, len(q)), q.shape[-1], q.shape[1] // k.shape[1]
    out = []
    for dims in band_dims(dim, **layout):
        table = torch.zeros(*q.shape[:2], prompt.n_q, prompt.n_k, dtype=torch.float64)
        for b in range(len(q)):
            rows, columns = seen[b, 0].any(1), seen[b, 0].any(0)
            for h in range(q.shape[1]):
                real_q, real_k = q_means[b, h, rows], k_means[b, h // group]
                real_k = real_k[reference.padding_of(prompt, b) // 16 :]  # without whole blocks of padding
                if not len(real_q):
                    continue
                temperature = math.sqrt(len(dims) / dim)
                temperature *= rms(real_q[:, dims]) / rms(real_q) * rms(real_k[:, dims]) / rms(real_k)
                products = q_means[b, h][:, dims] @ k_means[b, h // group][:, dims].T
                logits = (products / (math.sqrt(len(dims)) * temperature)).masked_fill(~seen[b, 0], -math.inf)
                table[b, h][rows] = logits[rows].softmax(-1)
                assert not table[b, h][:, ~columns].any()
        out.append(table)
    return out


def top_p(table, share, prompt):
    """The fewest visible blocks of each row that hold the share."""
    seen = reference.visible(prompt, len(table)).expand_as(table)
    keep = torch.zeros_like(table, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, table.shape[:3])).tolist():
        row = table[b, h, i].tolist()
        keep[b, h, i, list(reference.largest(row, reference.fewest(row, share)) if any(row) else [])] = True
    return keep & seen


# Against plain loops --------------------------------------------------------------------------------------


@every_layout
@every_prompt
def test_scores_equal_plain_loops(sizes, layout):
    q, k, prompt = inputs(**sizes)
    scores = sp.get_estimator("spectral_bands", **layout)(q, k, prompt)
    for got, want in zip(scores, bands(q, k, prompt, layout), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.95])
@every_layout
@every_prompt
def test_keeps_the_fewest_blocks_of_each_band_that_hold_the_share_and_the_own_blocks(sizes, layout, share):
    q, k, prompt = inputs(**sizes)
    high, low = bands(q, k, prompt, layout)
    want = top_p(high, share, prompt) | top_p(low, share, prompt) | reference.diagonal(prompt, len(q))
    assert torch.equal(prism(share, **layout).keep(q, k, prompt), want)


def test_the_inputs_of_this_file_skip_blocks_and_the_bands_differ():
    q, k, prompt = inputs(q_len=300)
    for share in (0.5, 0.95):
        assert (prompt.visible() & ~prism(share).keep(q, k, prompt)).any((2, 3)).all()
    high, low = sp.get_estimator("spectral_bands")(q, k, prompt)
    assert (high.argmax(-1) != low.argmax(-1)).any(-1).all()


def test_the_first_block_is_kept_by_default():
    q, k, prompt = inputs(q_len=300)
    keep = sp.get_strategy("prism", block_size=16, share=0.5).keep(q, k)
    assert torch.equal(keep, prism(0.5).keep(q, k) | prompt.sink_blocks(1))
    assert not prism(0.5).keep(q, k)[..., 0].all()


# Bands ----------------------------------------------------------------------------------------------------


def test_bands_are_the_published_ones_for_heads_of_128():
    high, low = SpectralBands().bands(128)
    assert high.nonzero()[:, 0].tolist() == [*range(32), *range(64, 96)]
    assert low.nonzero()[:, 0].tolist() == [*range(16, 64), *range(80, 128)]
    high, low = SpectralBands(rope="interleaved").bands(128)
    assert high.nonzero()[:, 0].tolist() == [*range(64)]
    assert low.nonzero()[:, 0].tolist() == [*range(32, 128)]


@pytest.mark.parametrize("dim", [2, 6, 16, 64, 80, 96])
def test_default_bands_are_whole_pairs_that_cover_all_dimensions(dim):
    for rope in ("half_split", "interleaved"):
        for rotated in {None, dim, max(2, dim // 4 * 2)}:
            high, low = SpectralBands(rope=rope, rotated=rotated).bands(dim)
            assert high.sum() % 2 == low[: dim if rotated is None else rotated].sum() % 2 == 0
            assert high.any()
            assert low.any()
            assert dim < 8 or (high | low).all()


def test_dimensions_without_rotation_are_in_the_low_band():
    for rope in ("half_split", "interleaved"):
        high, low = SpectralBands(rope=rope, rotated=8, low=2).bands(16)
        assert low[8:].all()
        assert not high[8:].any()
        assert low[:8].sum() == 2


@pytest.mark.parametrize("rotated", [16, 8])
def test_both_layouts_of_the_same_heads_give_the_same_table(rotated):
    q, k, _ = inputs(q_len=300)
    pairs = torch.arange(rotated).view(2, -1).T.flatten()  # 0, d / 2, 1, d / 2 + 1, ...
    order = torch.cat([pairs, torch.arange(rotated, 16)])
    half_split = prism(0.8, rope="half_split", rotated=rotated).keep(q, k)
    interleaved = prism(0.8, rope="interleaved", rotated=rotated).keep(q[..., order], k[..., order])
    assert torch.equal(interleaved, half_split)
    assert not torch.equal(
        prism(0.8, rope="half_split", rotated=rotated).keep(q[..., order], k[..., order]), half_split
    )


def test_bands_of_all_dimensions_equal_mean_pooling():
    q, k, prompt = inputs(q_len=300)
    pooled = sp.get_estimator("pooled_attention")(q, k, prompt)
    for scores in sp.get_estimator("spectral_bands", high=16, low=16)(q, k, prompt):
        torch.testing.assert_close(scores, pooled, rtol=1e-4, atol=1e-7)
    plain = sp.get_strategy("mean_pool", share=0.8, sink=0, block_size=16).keep(q, k)
    assert torch.equal(prism(0.8, high=16, low=16).keep(q, k), plain)


# Layers ---------------------------------------------------------------------------------------------------


def layer(layout="interleaved", pairs=8):
    return sp.Layer(3, 12, sp.Rope(layout, tuple(100.0**-i for i in range(pairs))))


def test_the_layout_and_the_rotated_dimensions_come_from_the_layer():
    q, k, _ = inputs(q_len=300)
    bound = prism(0.8).for_layer(layer(pairs=5))
    assert (bound.rope, bound.rotated) == ("interleaved", 10)
    assert torch.equal(bound.keep(q, k), prism(0.8, rope="interleaved", rotated=10).keep(q, k))
    assert not torch.equal(bound.keep(q, k), prism(0.8).keep(q, k))
    assert prism(0.8).for_layer(sp.Layer(0, 12)) == prism(0.8)
    assert bound.for_layer(layer(pairs=5)) == bound


def test_options_that_contradict_the_layer_are_refused():
    with pytest.raises(ValueError, match="rope='half_split', but layer 3 has 'interleaved'"):
        prism(rope="half_split").for_layer(layer())
    with pytest.raises(ValueError, match="rotated=8, but layer 3 has 16"):
        prism(rotated=8).for_layer(layer())


# Properties -----------------------------------------------------------------------------------------------


@given(low=st.floats(0.01, 1), high=st.floats(0.01, 1), seed=a_seed)
def test_a_larger_share_keeps_a_superset(low, high, seed):
    q, k, _ = inputs(q_len=200, seed=seed)
    low, high = sorted((low, high))
    assert not (prism(low).keep(q, k) & ~prism(high).keep(q, k)).any()


@given(tokens=st.sampled_from([40, 63, 129, 200]), seed=a_seed)
def test_a_share_of_one_keeps_all_blocks(tokens, seed):
    q, k, prompt = inputs(q_len=tokens, seed=seed)
    assert torch.equal(prism(1).keep(q, k), prompt.visible().expand(1, 6, -1, -1))


@given(factor=st.sampled_from([0.25, 0.5, 8.0]), seed=a_seed)
def test_moving_a_factor_from_the_keys_to_the_queries_changes_nothing(factor, seed):
    q, k, _ = inputs(q_len=200, seed=seed)
    assert torch.equal(prism().keep(q * factor, k / factor), prism().keep(q, k))


def test_temperatures_do_not_depend_on_the_scale_of_the_queries():
    q, k, prompt = inputs(q_len=200, scale=1.0)
    estimator = sp.get_estimator("spectral_bands")
    for once, thrice in zip(estimator(q, k, prompt), estimator(3 * q, k, prompt), strict=True):
        torch.testing.assert_close((3 * once[..., -1, :].log()).softmax(-1), thrice[..., -1, :], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tokens", [17, 129, 300])
def test_the_mean_of_a_partial_last_block_is_over_its_tokens_only(tokens):
    q, k, prompt = inputs(q_len=tokens)
    k[:] = k[:, :, :1]  # every mean equals this key, unless it is over more slots than tokens
    for scores in sp.get_estimator("spectral_bands")(q, k, prompt):
        torch.testing.assert_close(scores[..., -1, :], torch.full_like(scores[..., -1, :], 1 / prompt.n_k))


@pytest.mark.parametrize("padding", [16, 48])
def test_left_padding_of_whole_blocks_changes_no_score(padding):
    q, k, _ = inputs(q_len=200)
    estimator = sp.get_estimator("spectral_bands")
    padded = estimator(q, k, sp.Prompt(200, block_size=16, left_padding=[padding]))
    q, k = q[:, :, padding:], k[:, :, padding:]
    blocks = padding // 16
    for with_padding, unpadded in zip(padded, estimator(q, k, sp.Prompt(200 - padding, block_size=16)), strict=True):
        torch.testing.assert_close(with_padding[..., blocks:, blocks:], unpadded)
        assert not with_padding[..., :blocks].any()


def test_a_query_block_across_two_key_blocks_sees_and_keeps_both():
    q, k, prompt = inputs(q_len=41, kv_len=205)
    assert prompt.offset // 16 == 10  # rows 0 to 15 are at positions 164 to 179, in blocks 10 and 11
    assert (prism(0.01).keep(q, k)[:, :, 0, 10:12]).all()
    assert all((scores[:, :, 0, 11] > 0).all() for scores in sp.get_estimator("spectral_bands")(q, k, prompt))


def test_temperatures_depend_on_all_queries_so_chunks_may_select_other_blocks():
    q, k, _ = inputs(q_len=192)
    assert not sp.get_strategy("prism").chunk_invariant
    q[:, :, 96:, :4] *= 100
    whole = prism(0.6).keep(q, k)[:, :, :6, :6]
    assert not torch.equal(prism(0.6).keep(q[:, :, :96], k[:, :, :96]), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_bands_and_huge_inputs_give_finite_scores(dtype):
    q, k, prompt = inputs(q_len=200)
    zeros = sp.get_estimator("spectral_bands")(torch.zeros_like(q), k, prompt)
    assert all(torch.allclose(scores[..., -1, :], torch.tensor(1 / prompt.n_k)) for scores in zeros)
    q[..., :4] = q[..., 8:12] = 0
    high, low = sp.get_estimator("spectral_bands")((q * 1000).to(dtype), k.to(dtype), prompt)
    torch.testing.assert_close(high[..., -1, :], torch.full_like(high[..., -1, :], 1 / prompt.n_k))
    torch.testing.assert_close(low.sum(-1), torch.ones(1, 6, prompt.n_q))


# Refused options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0}, "share must be"),
        ({"share": "0.9"}, "share must be"),
        ({"rope": "neox"}, "rope must be one of half_split, interleaved, got 'neox'"),
        ({"high": 0}, "high must be a whole number, 2 or more"),
        ({"low": 3}, "low must be an even number"),
        ({"rotated": 7}, "rotated must be an even number"),
        ({"high": 4.0}, "high must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sp.get_strategy("prism", **options)


@pytest.mark.parametrize("options", [{"high": 18}, {"low": 18}, {"rotated": 18}, {"rotated": 8, "low": 10}])
def test_bands_wider_than_the_heads_are_refused(options):
    q, k, _ = inputs(q_len=100)
    with pytest.raises(ValueError, match="head_dim 16"):
        prism(**options).keep(q, k)

"""SpargeAttention equals its formulas in plain loops, and ignores the means of dissimilar blocks."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.estimators import dissimilar_blocks, key_similarity, query_similarity, self_similarity

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "127": {"q_len": 127},
    "a token after whole blocks": {"q_len": 129},
    "300": {"q_len": 300, "heads": 4, "kv_heads": 1},
    "batch, no groups": {"q_len": 100, "batch": 2, "heads": 4, "kv_heads": 4},
    "chunk": {"q_len": 64, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "chunk under a block": {"q_len": 5, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "heads": 4, "kv_heads": 2, "left_padding": [37, 0]},
    "padded chunk": {"q_len": 41, "kv_len": 205, "batch": 2, "heads": 4, "left_padding": [20, 170]},
    "all padding": {"q_len": 64, "batch": 2, "heads": 2, "left_padding": [64, 3]},
}
every_prompt = pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
THRESHOLD = 0.3


def sparge(**options):
    return sp.get_strategy("sparge_attention", **{"similarity": THRESHOLD, "block_size": 16, **options})


def inputs(left_padding=None, seed=0, **sizes):
    """Similar and dissimilar blocks: a common vector is added to the tokens of some blocks."""
    q, k, _ = reference.random_qkv(seed=seed, **sizes)
    source = torch.Generator().manual_seed(seed + 1)
    for x, odds in ((q, 0.8), (k, 0.7)):
        blocks = -(-x.shape[2] // 16)
        common = torch.randn(*x.shape[:2], blocks, x.shape[3], generator=source)
        chosen = torch.rand(*x.shape[:2], blocks, 1, generator=source) < odds
        x += (3 * common * chosen).repeat_interleave(16, 2)[:, :, : x.shape[2]]
    return q, k, sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding)


def similarity(x, prompt, queries):
    """Mean cosine of all pairs of real tokens of each block, 0 if there are none: float64 [B, H, blocks]."""
    n, block = (prompt.n_q, reference.query_block) if queries else (prompt.n_k, reference.key_block)
    offset = prompt.offset if queries else 0
    out = torch.zeros(*x.shape[:2], n, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        real = [t for t in block(prompt, i) if t + offset >= reference.padding_of(prompt, b)]
        pairs = [
            torch.nn.functional.cosine_similarity(x[b, h, s].double(), x[b, h, t].double(), dim=0)
            for s in real
            for t in real
        ]
        out[b, h, i] = sum(pairs) / max(len(pairs), 1)
    return out


def plain_similarity(x, prompt, queries):
    """The same by matrix products, for the tests of whole tables."""
    n, block = (prompt.n_q, reference.query_block) if queries else (prompt.n_k, reference.key_block)
    offset = prompt.offset if queries else 0
    out = torch.zeros(*x.shape[:2], n, dtype=torch.float64)
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    for b, i in torch.cartesian_prod(torch.arange(len(x)), torch.arange(n)).tolist():
        real = [t for t in block(prompt, i) if t + offset >= reference.padding_of(prompt, b)]
        if real:
            out[b, :, i] = (unit[b, :, real] @ unit[b, :, real].mT).mean((1, 2))
    return out


def plain_keep(q, k, prompt, threshold, cdf=0.98, topk=None):
    group = q.shape[1] // k.shape[1]
    rows, columns = plain_similarity(q, prompt, True) > threshold, plain_similarity(k, prompt, False) > threshold
    q_means, k_means = reference.block_means(q, prompt, True), reference.block_means(k, prompt, False)
    seen, own = reference.visible(prompt, len(q)), reference.diagonal(prompt, len(q))
    keep = torch.zeros(*q.shape[:2], prompt.n_q, prompt.n_k, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, keep.shape[:3])).tolist():
        visible = seen[b, 0, i].nonzero()[:, 0].tolist()
        similar = [j for j in visible if columns[b, h // group, j]]
        kept = set(visible) - set(similar) | set(own[b, 0, i].nonzero()[:, 0].tolist()) | set(visible[:1])
        if not rows[b, h, i]:
            kept = set(visible)
        elif similar:
            logits = [float(q_means[b, h, i] @ k_means[b, h // group, j]) / math.sqrt(q.shape[-1]) for j in similar]
            mass = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
            count = reference.fewest(mass, cdf) if topk is None else math.ceil(topk * len(mass))
            kept |= {similar[m] for m in reference.largest(mass, count)}
        keep[b, h, i, list(kept)] = True
    return keep


# Against plain loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["63", "chunk off the grid", "padded chunk"])
def test_similarity_is_the_mean_cosine_of_all_pairs_of_tokens(name):
    q, k, prompt = inputs(**{"heads": 2, "kv_heads": 2, **PROMPTS[name], "batch": PROMPTS[name].get("batch", 1)})
    q, k = q[:, :1], k[:, :1]
    want = similarity(q, prompt, True), similarity(k, prompt, False)
    torch.testing.assert_close(query_similarity(q, prompt).double(), want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(key_similarity(k, prompt).double(), want[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain_similarity(k, prompt, False), want[1])


@every_prompt
def test_similarity_of_every_prompt_equals_plain_loops(sizes):
    q, k, prompt = inputs(**sizes)
    for found, want in (
        (query_similarity(q, prompt), plain_similarity(q, prompt, True)),
        (key_similarity(k, prompt), plain_similarity(k, prompt, False)),
    ):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"cdf": 0.98}, {"cdf": 0.6}, {"cdf": 1.0}, {"topk": 0.3}, {"topk": 1.0}], ids=str)
@every_prompt
def test_the_table_equals_plain_loops(sizes, options):
    q, k, prompt = inputs(**sizes)
    assert torch.equal(sparge(**options).keep(q, k, prompt), plain_keep(q, k, prompt, THRESHOLD, **options))


def test_the_inputs_of_this_file_have_dissimilar_blocks_and_skip_blocks():
    q, k, prompt = inputs(q_len=300)
    rows, columns = dissimilar_blocks(q, k, prompt, THRESHOLD)
    for found in (rows, columns):
        assert 0.1 < found.float().mean() < 0.5
    keep = sparge().keep(q, k, prompt)
    assert (prompt.visible() & ~keep).any((2, 3)).all()
    assert torch.equal(keep[rows[..., 0]], prompt.visible().expand_as(keep)[rows[..., 0]])


@pytest.mark.parametrize("elements", [1, 3 * 6 * 16 * 16, 2**40])
@every_prompt
def test_similarity_does_not_depend_on_the_number_of_blocks_per_step(sizes, elements, monkeypatch):
    q, k, prompt = inputs(**sizes)
    before = query_similarity(q, prompt), key_similarity(k, prompt)
    monkeypatch.setattr(self_similarity, "MAX_ELEMENTS", elements)
    torch.testing.assert_close((query_similarity(q, prompt), key_similarity(k, prompt)), before)


# Properties -----------------------------------------------------------------------------------------------

a_seed = st.integers(0, 99)
lengths = st.sampled_from([40, 63, 129, 200])


@given(tokens=lengths, seed=a_seed)
def test_a_threshold_above_one_and_a_cdf_of_one_keep_all_blocks(tokens, seed):
    q, k, prompt = inputs(q_len=tokens, seed=seed)
    everything = prompt.visible().expand(1, 6, -1, -1)
    assert torch.equal(sparge(similarity=1.01).keep(q, k, prompt), everything)
    assert torch.equal(sparge(similarity=1.01, topk=0.1).keep(q, k, prompt), everything)
    assert torch.equal(sparge(cdf=1.0).keep(q, k, prompt), everything)


@given(low=st.floats(0.01, 1), high=st.floats(0.01, 1), option=st.sampled_from(["cdf", "topk"]), seed=a_seed)
def test_a_larger_share_keeps_a_superset(low, high, option, seed):
    q, k, prompt = inputs(q_len=200, seed=seed)
    low, high = sorted((low, high))
    assert not (sparge(**{option: low}).keep(q, k, prompt) & ~sparge(**{option: high}).keep(q, k, prompt)).any()


@given(cdf=st.sampled_from([0.5, 0.9, 0.98]), tokens=lengths, seed=a_seed)
def test_without_dissimilar_blocks_the_table_equals_mean_pool(cdf, tokens, seed):
    q, k, prompt = inputs(q_len=tokens, seed=seed)
    pooled = sp.get_strategy("mean_pool", share=cdf, block_size=16)
    assert torch.equal(sparge(similarity=-0.1, cdf=cdf).keep(q, k, prompt), pooled.keep(q, k, prompt))


@given(seed=a_seed)
def test_dissimilar_key_blocks_do_not_change_the_selection_among_the_others(seed):
    q, k, prompt = inputs(q_len=200, seed=seed)
    _, columns = dissimilar_blocks(q, k, prompt, THRESHOLD)
    before = sparge(cdf=0.6).keep(q, k, prompt)
    # The size of the mean of a dissimilar block has no effect.
    noise = columns[:, ::3, 0].repeat_interleave(16, 2)[:, :, :200, None]
    k = torch.where(noise, k * 1000, k)
    assert torch.equal(sparge(cdf=0.6).keep(q, k, prompt), before)
    unguarded = sparge(similarity=-0.1, cdf=0.6).keep(q, k, prompt)
    assert not columns.any() or not torch.equal(unguarded, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_tokens_have_similarity_one_and_n_orthogonal_tokens_one_over_n(dtype):
    same = torch.randn(1, 2, 1, 32).expand(-1, -1, 40, -1).to(dtype)
    prompt = sp.Prompt(40, block_size=16)
    torch.testing.assert_close(key_similarity(same, prompt), torch.ones(1, 2, 3))
    orthogonal = torch.eye(16, 32, dtype=dtype).expand(1, 1, -1, -1) * 100
    torch.testing.assert_close(
        query_similarity(orthogonal, sp.Prompt(16, block_size=16)), torch.full((1, 1, 1), 1 / 16)
    )


def test_zero_vectors_have_similarity_zero():
    zero = torch.zeros(1, 2, 32, 16)
    assert (key_similarity(zero, sp.Prompt(32, block_size=16)) == 0).all()
    assert sparge(similarity=0.0).keep(zero, zero).sum() == 2 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": math.nan}, "similarity must be a finite number"),
        ({"similarity": "0.6"}, "similarity must be a finite number"),
        ({"cdf": 0}, "cdf must be"),
        ({"cdf": 1.1}, "cdf must be"),
        ({"topk": 0.0}, "topk must be"),
        ({"topk": 5}, "topk must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparge(**options)

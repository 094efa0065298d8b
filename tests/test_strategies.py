"""Every registered strategy in every situation: new strategies are tested without changes here."""

from functools import cache

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill import registry

NAMES = sp.list_strategies()
SPARSE = [name for name in NAMES if name != "dense"]
# Means of random blocks are so similar that the default would skip nothing.
SHARPER = {
    "flash_prefill": {"alpha": 0.5},
    "lserve": {"local": 64},
    "mean_slash": {"threshold": 0.1},
    "moba": {"k": 4},
    "prism": {"share": 0.5},
    "seer_attention": {"threshold": 0.05, "last": 17},
    "sparge_attention": {"similarity": 0.04, "cdf": 0.5},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def small(name, block_size=16, **options):
    """A strategy with sizes in tokens scaled to its blocks, so that short prompts have blocks to skip."""
    defaults = registry.strategies.options(name)
    sizes = {o: d * block_size // 128 for o, d in defaults.items() if type(d) is int and d >= 128}
    sizes.update(block_size=block_size, min_length=0)
    return sp.get_strategy(name, **{**sizes, **SHARPER.get(name, {}), **options})


def case(batch=1, heads=6, kv_heads=2, q_len=333, kv_len=None, scale=4.0, dtype=torch.float32, size=16, padding=None):
    qkv = reference.random_qkv(batch, heads, kv_heads, q_len, kv_len, scale=scale, dtype=dtype)
    return qkv, sp.Prompt(q_len, kv_len or q_len, size, left_padding=padding)


CASES = {
    "odd length, 3 query heads to a key head": case(),
    "whole blocks, batch of 2, no groups": case(batch=2, heads=4, kv_heads=4, q_len=160),
    "chunk on the grid, 4 query heads to a key head": case(heads=4, kv_heads=1, q_len=64, kv_len=208),
    "chunk off the grid": case(heads=4, kv_heads=1, q_len=41, kv_len=205),
    "left padding": case(batch=2, heads=4, kv_heads=4, q_len=150, padding=[37, 0]),
    "padded chunk": case(batch=2, heads=4, kv_heads=4, q_len=41, kv_len=205, padding=[170, 20]),
    "peaked": case(scale=50.0),
    "blocks of 32": case(size=32),
    "bf16": case(dtype=torch.bfloat16),
    "fp16": case(dtype=torch.float16),
}


@cache
def solved(name, situation):
    """Strategy, inputs, keep table and output, computed once for all tests of a situation."""
    (q, k, v), prompt = CASES[situation]
    strategy = small(name, prompt.block_size)
    keep = strategy.keep(q, k, prompt)
    if prompt.is_single:
        out = sp.sparse_attention(q, k, v, strategy, prompt=prompt)
    else:  # the same, on the block grid that rows of a padded batch share
        out = strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep)
    return strategy, (q, k, v), prompt, keep, out


every_strategy = pytest.mark.parametrize("name", NAMES)
every_situation = pytest.mark.parametrize("situation", CASES)


@every_situation
@every_strategy
def test_output_is_attention_over_the_kept_blocks(name, situation):
    _, (q, k, v), prompt, keep, out = solved(name, situation)
    want = reference.sparse_attention(q, k, v, keep, prompt)
    assert out.dtype == q.dtype
    tolerance = 1e-4 if situation == "peaked" else TOLERANCE[q.dtype]  # large logits round more coarsely
    torch.testing.assert_close(out.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("situation", [s for s in CASES if s != "peaked"])
@every_strategy
def test_output_differs_from_dense_attention_where_a_block_is_skipped(name, situation):
    _, (q, k, v), prompt, keep, out = solved(name, situation)
    skipped = bool((prompt.visible() & ~keep).any())
    difference = (out - reference.dense_attention(q, k, v, prompt)).abs().max()
    assert skipped == (difference > 3 * TOLERANCE[q.dtype])


@pytest.mark.parametrize("name", SPARSE)
def test_every_sparse_strategy_skips_blocks_in_these_situations(name):
    _, _, prompt, keep, _ = solved(name, "odd length, 3 query heads to a key head")
    assert keep.sum((-2, -1)).max() < prompt.visible().sum()


@every_situation
@every_strategy
def test_keep_is_a_bool_table_of_visible_blocks_with_the_diagonal(name, situation):
    strategy, (q, _, _), prompt, keep, _ = solved(name, situation)
    batch, heads = q.shape[:2]
    assert keep.dtype == torch.bool
    keep = keep.broadcast_to(batch, heads, prompt.n_q, prompt.n_k)
    visible, diagonal = reference.visible(prompt, batch), reference.diagonal(prompt, batch)
    assert not (keep & ~visible).any()
    assert (keep | ~diagonal).all()
    if strategy.sink:
        assert (keep | ~(prompt.sink_blocks(strategy.sink) & visible)).all()


@every_strategy
def test_blocks_of_guards_are_always_kept(name):
    (q, k, _), prompt = CASES["chunk off the grid"]
    free = small(name, local=0, last=0).keep(q, k, prompt)
    guarded = small(name, sink=20, local=40, last=10).keep(q, k, prompt)
    forced = prompt.sink_blocks(20) | prompt.local_blocks(40) | prompt.tail_blocks(10)
    visible = prompt.visible()
    assert (guarded | ~(forced & visible)).all()
    assert torch.equal(guarded, (free | forced) & visible)


@every_strategy
def test_block_mask_compiled_by_the_caller_attends_over_the_kept_blocks(name):
    strategy, (q, k, v), _, _, out = solved(name, "odd length, 3 query heads to a key head")
    mask = strategy.block_mask(q, k)
    assert mask.seq_lengths == (333, 333)
    compiled = compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(compiled, out, rtol=0, atol=1e-5)


@cache
def compiled_flex_attention():
    return torch.compile(torch.nn.attention.flex_attention.flex_attention, fullgraph=True, dynamic=True)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 127, 129, 1000])
@every_strategy
def test_output_is_finite_at_every_length(name, tokens):
    q, k, v = reference.random_qkv(q_len=tokens, scale=4)
    strategy, prompt = small(name), sp.Prompt(q_len=tokens, block_size=16)
    out = sp.sparse_attention(q, k, v, strategy)
    assert out.isfinite().all()
    if tokens < 1000:
        want = reference.sparse_attention(q, k, v, strategy.keep(q, k), prompt)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


@every_strategy
def test_constant_inputs_whose_scores_tie_give_the_attention_of_their_table(name):
    (q, k, v), prompt = CASES["odd length, 3 query heads to a key head"]
    q, k = torch.ones_like(q), torch.ones_like(k)
    strategy = small(name)
    keep = strategy.keep(q, k)
    assert (keep | ~reference.diagonal(prompt)).all()
    out = sp.sparse_attention(q, k, v, strategy)
    torch.testing.assert_close(out.double(), reference.sparse_attention(q, k, v, keep, prompt), rtol=0, atol=1e-5)


# Invariants -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 12])
@every_strategy
def test_keys_and_values_of_a_block_change_only_the_rows_that_keep_it(name, block):
    _, (q, k, v), prompt, keep, _ = solved(name, "odd length, 3 query heads to a key head")
    before = sp.block_sparse_attention(q, k, v, keep, prompt=prompt)
    k, v = k.clone(), v.clone()
    tokens = slice(block * 16, block * 16 + 16)
    k[:, :, tokens], v[:, :, tokens] = 100, -1e6
    after = sp.block_sparse_attention(q, k, v, keep, prompt=prompt)
    reads = keep[..., block].expand(1, 6, -1).repeat_interleave(16, 2)[..., :333]
    assert torch.equal(before[~reads], after[~reads])
    below = reads & (torch.arange(333) >= tokens.stop)
    assert (before[below] != after[below]).any(-1).all()


@every_strategy
def test_reordered_heads_have_the_same_selection_and_output(name):
    strategy, (q, k, v), prompt, keep, out = solved(name, "whole blocks, batch of 2, no groups")
    order = torch.tensor([2, 0, 3, 1])
    keep = keep.expand(-1, 4, -1, -1)
    assert torch.equal(strategy.keep(q[:, order], k[:, order], prompt).expand(-1, 4, -1, -1), keep[:, order])
    moved = sp.sparse_attention(q[:, order], k[:, order], v[:, order], strategy)
    assert torch.equal(moved, out[:, order])


@every_strategy
def test_grouped_heads_equal_repeated_keys(name):
    strategy, (q, k, v), _, keep, _ = solved(name, "chunk off the grid")
    k, v = k.repeat_interleave(4, dim=1), v.repeat_interleave(4, dim=1)
    assert torch.equal(strategy.keep(q, k).expand(-1, 4, -1, -1), keep.expand(-1, 4, -1, -1))
    out = solved(name, "chunk off the grid")[-1]
    torch.testing.assert_close(sp.sparse_attention(q, k, v, strategy), out, rtol=0, atol=1e-6)


@every_strategy
def test_a_row_of_a_batch_equals_a_separate_prompt(name):
    strategy, (q, k, v), _, keep, out = solved(name, "whole blocks, batch of 2, no groups")
    for b in range(2):
        separate = q[b : b + 1], k[b : b + 1], v[b : b + 1]
        assert torch.equal(strategy.keep(*separate[:2]).expand(1, 4, -1, -1), keep.expand(2, 4, -1, -1)[b : b + 1])
        torch.testing.assert_close(sp.sparse_attention(*separate, strategy), out[b : b + 1], rtol=0, atol=1e-6)


@every_strategy
def test_output_is_linear_in_the_values(name):
    strategy, (q, k, v), _, _, out = solved(name, "odd length, 3 query heads to a key head")
    assert torch.equal(sp.sparse_attention(q, k, v * 4, strategy), out * 4)


@every_strategy
def test_later_tokens_do_not_change_earlier_rows_for_a_fixed_table(name):
    _, (q, k, v), prompt, keep, _ = solved(name, "odd length, 3 query heads to a key head")
    before = sp.block_sparse_attention(q, k, v, keep, prompt=prompt)
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v):
        x[:, :, 200:] = -7
    after = sp.block_sparse_attention(q, k, v, keep, prompt=prompt)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before, after)


@every_strategy
def test_prompts_under_the_minimum_length_run_exactly_dense(name):
    q, k, v = reference.random_qkv(q_len=333, scale=4)
    strategy = small(name, min_length=334)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(sp.sparse_attention(q, k, v, strategy), dense)


# Left padding ---------------------------------------------------------------------------------------------


@every_strategy
def test_padding_is_neither_attended_nor_scored_nor_pooled(name):
    strategy, (q, k, v), prompt, keep, out = solved(name, "left padding")
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v):
        x[0, :, :37] = 1e4
    assert torch.equal(strategy.keep(q, k, prompt), keep)
    assert torch.equal(strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep), out)


@pytest.mark.parametrize("situation", ["left padding", "padded chunk"])
@every_strategy
def test_rows_of_padding_are_zero(name, situation):
    _, _, prompt, _, out = solved(name, situation)
    rows = prompt.query_positions()
    assert (out[0, :, rows < prompt.left_padding[0]] == 0).all()
    assert (out[0, :, rows >= prompt.left_padding[0]] != 0).any(-1).all()


@given(blocks=st.integers(1, 4), tokens=st.sampled_from([96, 150, 161]))
@every_strategy
def test_padding_by_whole_blocks_shifts_the_selection(name, blocks, tokens):
    padding = 16 * blocks
    q, k, _ = reference.random_qkv(heads=4, kv_heads=2, q_len=padding + tokens, scale=4, seed=tokens)
    strategy = small(name)
    prompt = sp.Prompt(q_len=padding + tokens, block_size=16, left_padding=[padding])
    separate = strategy.keep(q[:, :, padding:], k[:, :, padding:])
    padded = strategy.keep(q, k, prompt)
    assert torch.equal(padded[..., blocks:, blocks:], separate)
    assert not padded[..., :blocks, :].any()
    assert not padded[..., :blocks].any()


@every_strategy
def test_a_row_of_only_padding_gives_zeros(name):
    q, k, v = reference.random_qkv(batch=2, q_len=150, scale=4)
    prompt = sp.Prompt(q_len=150, block_size=16, left_padding=[150, 0])
    out = sp.sparse_attention(q, k, v, small(name), prompt=prompt)
    assert (out[0] == 0).all()
    assert out.isfinite().all()


# Documents ------------------------------------------------------------------------------------------------

TAKES_DOCUMENTS = ["a_shape", "dense", "oracle"]
DOCUMENTS = [0] * 70 + [1] * 5 + [2] * 75


@pytest.mark.parametrize("name", TAKES_DOCUMENTS)
@pytest.mark.parametrize("rows", [[DOCUMENTS], [DOCUMENTS, [0] * 150]], ids=["one row", "batch of 2"])
def test_tokens_attend_only_within_their_document(name, rows):
    prompt = sp.Prompt(q_len=150, block_size=16, documents=rows)
    q, k, v = reference.random_qkv(batch=len(rows), q_len=150, scale=4)
    strategy = small(name)
    keep = strategy.keep(q, k, prompt)
    out = strategy.attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep)
    torch.testing.assert_close(out.double(), reference.sparse_attention(q, k, v, keep, prompt), rtol=0, atol=1e-5)
    assert (out - reference.dense_attention(q, k, v, sp.Prompt(150, block_size=16))).abs().max() > 0.1


@pytest.mark.parametrize("name", TAKES_DOCUMENTS)
def test_documents_of_whole_blocks_are_selected_like_separate_prompts(name):
    q, k, _ = reference.random_qkv(q_len=160, scale=4)
    strategy = small(name)
    together = strategy.keep(q, k, sp.Prompt(q_len=160, block_size=16, documents=[0] * 96 + [1] * 64))
    for blocks in (slice(0, 6), slice(6, 10)):
        tokens = slice(blocks.start * 16, blocks.stop * 16)
        assert torch.equal(together[..., blocks, blocks], strategy.keep(q[:, :, tokens], k[:, :, tokens]))
    assert not together[..., 6:, :6].any()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TAKES_DOCUMENTS])
def test_other_strategies_refuse_a_table_for_documents_or_keep_them_separate(name):
    q, k, v = reference.random_qkv(q_len=150)
    prompt = sp.Prompt(q_len=150, block_size=16, documents=DOCUMENTS)
    try:
        keep = small(name).keep(q, k, prompt)
    except ValueError as error:
        refused = str(error)
    else:
        out = small(name).attend(sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), keep)
        torch.testing.assert_close(out.double(), reference.sparse_attention(q, k, v, keep, prompt), rtol=0, atol=1e-5)
        return
    assert "one table for packed documents" in refused
    assert "prompt.split_sequences()" in refused


# One method at a time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("situation", ["odd length, 3 query heads to a key head", "chunk off the grid", "padded chunk"])
def test_a_shape_keeps_the_first_and_the_nearest_tokens_rounded_out(situation):
    _, prompt = CASES[situation]
    keep = sp.get_strategy("a_shape", block_size=16, sink=20, local=40).keep(*CASES[situation][0][:2], prompt)

    def is_kept(b, rows, keys):
        start, own = reference.padding_of(prompt, b), rows.start + prompt.offset
        sink = any(start <= key < start + 20 for key in keys)
        return sink or own - (keys.stop - 1) < 40

    batch = prompt.batch
    want = reference.block_table(prompt, batch, is_kept) & reference.visible(prompt, batch)
    assert torch.equal(keep.expand(batch, 1, -1, -1), want)


def test_a_shape_has_one_table_for_all_heads():
    (q, k, _), _ = CASES["whole blocks, batch of 2, no groups"]
    assert small("a_shape").keep(q, k).shape[:2] == (1, 1)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("situation", ["odd length, 3 query heads to a key head", "padded chunk"])
def test_oracle_keeps_the_fewest_blocks_that_hold_the_share_of_each_query_block(situation, share):
    (q, k, _), prompt = CASES[situation]
    keep = sp.get_strategy("oracle", block_size=16, share=share).keep(q, k, prompt)
    mass = reference.block_mass(q, k, prompt)
    visible, diag = reference.visible(prompt, len(q)), reference.diagonal(prompt, len(q))
    if share == 1:
        assert torch.equal(keep, visible.expand_as(keep))
        return
    for b, h, i in torch.cartesian_prod(*map(torch.arange, mass.shape[:3])).tolist():
        row = mass[b, h, i].tolist()
        if sum(row) > 0:
            want = reference.largest(row, reference.fewest(row, share)) | set(diag[b, 0, i].nonzero()[:, 0].tolist())
            assert set(keep[b, h, i].nonzero()[:, 0].tolist()) == want
        else:
            assert not keep[b, h, i].any()


def test_oracle_over_the_head_meets_the_share_with_no_more_blocks():
    (q, k, _), prompt = CASES["odd length, 3 query heads to a key head"]
    by_row = sp.get_strategy("oracle", block_size=16, share=0.8).keep(q, k)
    by_head = sp.get_strategy("oracle", block_size=16, share=0.8, scope="head").keep(q, k)
    mass = reference.block_mass(q, k, prompt)
    assert ((mass * by_head).sum((-2, -1)) >= 0.8 * prompt.n_q).all()
    assert by_head.sum() <= by_row.sum()


def test_dense_keeps_all_visible_blocks():
    (q, k, _), prompt = CASES["padded chunk"]
    assert torch.equal(small("dense").keep(q, k, prompt).expand(2, 1, -1, -1), reference.visible(prompt, 2))


def test_a_composed_strategy_equals_the_named_one_with_the_same_parts():
    (q, k, _), prompt = CASES["left padding"]
    composed = sp.ComposedStrategy(
        estimator=sp.get_estimator("true_mass"), selector=sp.get_selector("cumulative", share=0.8), block_size=16
    )
    oracle = sp.get_strategy("oracle", share=0.8, block_size=16)
    assert torch.equal(composed.keep(q, k, prompt), oracle.keep(q, k, prompt))

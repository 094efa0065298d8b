"""A prompt's block tables and token rule equal loops over its tokens."""

import pytest
import reference
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import sparse_prefill as sp

LENGTHS = [1, 15, 16, 17, 63, 64, 127, 129]


@st.composite
def prompts(draw):
    kv_len = draw(st.sampled_from(LENGTHS))
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)))
    size = draw(st.sampled_from([16, 32]))
    kind = draw(st.sampled_from(["plain", "padding", "documents"]))
    window = draw(st.one_of(st.none(), st.integers(1, kv_len)))
    if kind == "padding":
        left = draw(st.lists(st.integers(0, kv_len), min_size=1, max_size=3))
        right = [draw(st.integers(0, kv_len - padding)) for padding in left]
        sides = draw(st.sampled_from([{"left_padding": left}, {"right_padding": right}, None]))
        sides = {"left_padding": left, "right_padding": right} if sides is None else sides
        return sp.Prompt(q_len, kv_len, size, window=window, **sides)
    if kind == "documents":
        rows = draw(st.integers(1, 2))
        ids = [sorted(draw(st.lists(st.integers(0, 4), min_size=kv_len, max_size=kv_len))) for _ in range(rows)]
        return sp.Prompt(q_len, kv_len, size, documents=ids, window=window)
    return sp.Prompt(q_len, kv_len, size, window=window)


EXAMPLES = [
    sp.Prompt(40, 127, 16),  # a chunk whose query blocks lie across key blocks
    sp.Prompt(100, 100, 16, left_padding=[0, 37, 100]),
    sp.Prompt(30, 100, 16, left_padding=[80]),
    sp.Prompt(100, 100, 16, documents=[0] * 20 + [1] * 3 + [7] * 77),
    sp.Prompt(100, 100, 16, right_padding=[0, 37, 100]),
    sp.Prompt(40, 127, 16, left_padding=[3, 30, 80], right_padding=[20, 90, 47]),
    sp.Prompt(129, 129, 16, window=33),
    sp.Prompt(40, 127, 16, window=16, right_padding=[5]),
]


def every_example(test):
    for prompt in EXAMPLES:
        test = example(prompt)(test)
    return given(prompts())(test)


@every_example
def test_visible_blocks_are_those_with_an_allowed_token_pair(prompt):
    assert torch.equal(prompt.visible(), reference.visible(prompt, prompt.batch))


@every_example
def test_visible_rows_are_those_of_the_whole_table(prompt):
    for rows in (slice(0, 1), slice(prompt.n_q // 2, prompt.n_q), slice(1, 100)):
        assert torch.equal(prompt.visible_rows(rows), prompt.visible()[:, :, rows])


@every_example
def test_spread_rows_lie_in_their_blocks_and_attend_what_the_prompt_allows(prompt):
    blocks, rows, allowed = prompt.spread_rows(3, 2)
    assert blocks.tolist() == sorted(set(blocks.tolist()))
    assert len(blocks) == min(3, prompt.n_q)
    assert rows.tolist() == sorted(rows.tolist())
    assert torch.equal(rows // prompt.block_size, blocks.repeat_interleave(2))
    assert rows.max() < prompt.q_len
    want = reference.token_mask(prompt, prompt.batch)[:, rows]
    assert torch.equal(allowed.expand(prompt.batch, -1, -1, -1)[:, 0], want)
    assert prompt.spread_rows(3, 2)[2] is allowed


@every_example
def test_fully_visible_blocks_allow_every_pair_and_are_never_ragged(prompt):
    assert torch.equal(prompt.fully_visible(), reference.fully_visible(prompt, prompt.batch))


@every_example
def test_diagonal_blocks_hold_each_real_query_s_own_position(prompt):
    own = prompt.diagonal().expand(prompt.batch, -1, -1, -1)
    assert torch.equal(own, reference.diagonal(prompt, prompt.batch))


@every_example
def test_every_real_query_sees_its_own_block_and_padding_sees_nothing(prompt):
    real = prompt.real_queries().unflatten(1, (prompt.n_q, prompt.block_size)).any(-1)
    assert torch.equal(prompt.visible().any(-1)[:, 0], real)
    assert torch.equal((prompt.diagonal() & prompt.visible()).any(-1)[:, 0], real)


@every_example
def test_token_rules_equal_the_token_mask(prompt):
    mask = reference.token_mask(prompt, prompt.batch)
    allowed = prompt.may_attend(prompt.query_positions(), torch.arange(prompt.kv_len))
    assert torch.equal(allowed.expand(prompt.batch, -1, -1, -1)[:, 0], mask)

    mask_mod = prompt.mask_mod()
    b, q_idx, kv_idx = torch.arange(prompt.batch), torch.arange(prompt.q_len), torch.arange(prompt.kv_len)
    rule = mask_mod(b[:, None, None], torch.tensor(0), q_idx[None, :, None], kv_idx[None, None])
    assert torch.equal(rule.expand_as(mask), mask)


@every_example
def test_real_slots_are_neither_padding_nor_after_the_end(prompt):
    for b in range(prompt.batch):
        start, end = reference.padding_of(prompt, b), reference.spans(prompt, b)[-1][1]
        keys = [start <= t < end for t in range(prompt.n_k * prompt.block_size)]
        rows = range(prompt.n_q * prompt.block_size)
        queries = [start <= row + prompt.offset < end for row in rows]
        assert prompt.real_keys()[b].tolist() == keys
        assert prompt.real_queries()[b].tolist() == queries


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 40, 1000])
@pytest.mark.parametrize("prompt", EXAMPLES[:4], ids=["chunk", "padding", "padded chunk", "documents"])
def test_guards_cover_the_tokens_that_they_name_rounded_out_to_blocks(prompt, tokens):
    seen = prompt.visible()

    def first(b, rows, keys):
        return any(
            0 <= key - reference.first_key(prompt, b, key) < tokens and key >= reference.padding_of(prompt, b)
            for key in keys
        )

    def near(b, rows, keys):
        return rows.start + prompt.offset - (keys.stop - 1) < tokens

    def last(b, rows, keys):
        return rows.stop > prompt.q_len - tokens

    for table, rule in (
        (prompt.sink_blocks(tokens), first),
        (prompt.local_blocks(tokens), near),
        (prompt.tail_blocks(tokens), last),
    ):
        want = reference.block_table(prompt, prompt.batch, rule)
        assert torch.equal(table & seen, want & seen)


def test_one_block_of_a_128_token_prompt_and_a_ragged_one_of_129():
    whole, ragged = sp.Prompt(q_len=128), sp.Prompt(q_len=129)
    assert (whole.n_q, whole.n_k, ragged.n_q, ragged.n_k) == (1, 1, 2, 2)
    assert whole.block_size == 128
    assert ragged.fully_visible().tolist() == [[[[False, False], [True, False]]]]


def test_kv_len_is_q_len_unless_given_and_queries_come_last():
    assert sp.Prompt(q_len=100).kv_len == 100
    chunk = sp.Prompt(q_len=10, kv_len=100)
    assert chunk.offset == 90
    assert chunk.query_positions().tolist() == list(range(90, 100))


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 40, 1000])
def test_a_chunk_that_knows_the_whole_prompt_s_length_has_the_last_rows_of_the_whole_prompt(tokens):
    whole = sp.Prompt(127, block_size=16, left_padding=[5, 20])
    for begin, end in ((0, 64), (64, 112), (112, 127)):
        chunk = sp.Prompt(end - begin, end, 16, left_padding=[5, 20], total_len=127)
        rows = slice(begin // 16, -(-end // 16))
        want = whole.tail_blocks(tokens)[:, :, rows, : chunk.n_k]
        assert torch.equal(chunk.tail_blocks(tokens), want)
        if tokens:
            alone = sp.Prompt(end - begin, end, 16, left_padding=[5, 20])
            assert alone.tail_blocks(tokens)[:, :, -1].all()
    assert sp.Prompt(64, 112, 16, left_padding=[5, 20], total_len=127).split_sequences()[1].prompt.total_len == 107
    assert sp.Prompt(64, 112, 16, total_len=127).on_grid(32).total_len == 127


@pytest.mark.parametrize("total_len", [99, 0, True, 100.0, "100"])
def test_a_total_len_below_kv_len_is_refused(total_len):
    with pytest.raises(ValueError, match="total_len must be a whole number, 100 or more"):
        sp.Prompt(10, 100, total_len=total_len)


def test_padding_of_nothing_and_a_single_document_are_plain_causality():
    assert sp.Prompt(q_len=40, left_padding=[0, 0]).is_causal
    assert sp.Prompt(q_len=40, documents=[3] * 40).is_causal
    assert not sp.Prompt(q_len=40, left_padding=[0, 1]).is_causal
    assert not sp.Prompt(q_len=40, documents=[0] * 39 + [1]).is_causal


def test_padding_and_documents_may_come_as_tensors_of_any_whole_dtype():
    padding = sp.Prompt(40, block_size=16, left_padding=torch.tensor([3, 17], dtype=torch.int32))
    assert torch.equal(padding.visible(), sp.Prompt(40, block_size=16, left_padding=[3, 17]).visible())
    ids = torch.arange(40) // 9
    documents = sp.Prompt(40, block_size=16, documents=ids.to(torch.int16))
    assert torch.equal(documents.visible(), sp.Prompt(40, block_size=16, documents=ids.tolist()).visible())


def test_tables_of_a_128k_prompt_have_blocks_by_blocks_entries():
    prompt = sp.Prompt(q_len=131072)
    for table in (
        prompt.visible(),
        prompt.fully_visible(),
        prompt.diagonal(),
        prompt.local_blocks(1024),
        prompt.sink_blocks(128),
    ):
        assert table.untyped_storage().nbytes() <= 1024 * 1024


def test_guards_are_the_visible_blocks_of_their_parts_and_made_once():
    prompt = sp.Prompt(300, 1000, 16, left_padding=[20, 700], window=400)
    guards = prompt.guards(30, 50, 40)
    parts = prompt.diagonal() | prompt.sink_blocks(30) | prompt.local_blocks(50) | prompt.tail_blocks(40)
    assert torch.equal(guards, parts & prompt.visible())
    assert torch.equal(prompt.guards(0, 0, 0), prompt.diagonal())
    assert prompt.guards(30, 50, 40) is guards
    assert prompt.with_state(sp.KeyState()).guards(30, 50, 40) is guards

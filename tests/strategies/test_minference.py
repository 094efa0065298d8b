"""MInference equals its formulas in plain loops, reads and writes pattern files, avoids bugs of the released code."""

import json
import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_prefill as sp
from sparse_prefill.estimators import by_diagonal
from sparse_prefill.strategies.minference import HeadPattern, load_patterns, save_patterns

PROMPTS = {
    "one token": {"q_len": 1},
    "63": {"q_len": 63},
    "127": {"q_len": 127},
    "a token after whole blocks": {"q_len": 129},
    "333": {"q_len": 333},
    "batch, no groups": {"q_len": 160, "batch": 2, "kv_heads": 6},
    "chunk": {"q_len": 64, "kv_len": 208},
    "chunk off the grid": {"q_len": 41, "kv_len": 205, "kv_heads": 1},
    "chunk under a block": {"q_len": 5, "kv_len": 205},
    "one query": {"q_len": 1, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "left_padding": [37, 0]},
    "padded chunk": {"q_len": 41, "kv_len": 205, "batch": 2, "left_padding": [20, 170]},
    "all padding": {"q_len": 64, "batch": 2, "left_padding": [64, 3]},
}
every_prompt = pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)
a_seed = st.integers(0, 99)


def minference(size=16, **options):
    return sp.get_strategy("minference", **{"sink": 0, "local": 0, **options}, block_size=size, min_length=0)


def inputs(left_padding=None, scale=4.0, **sizes):
    q, k, _ = reference.random_qkv(scale=scale, **sizes)
    return q, k, sp.Prompt(q.shape[2], k.shape[2], 16, left_padding=left_padding)


# Formulas in plain loops ----------------------------------------------------------------------------------


def last_rows(q, k, prompt, last_q=64):
    """Attention of the last real queries: for each b and h a list of (position, float64 row over the keys)."""
    p = reference.probabilities(q, k, reference.token_mask(prompt, q.shape[0])[:, None])
    return [
        [
            [
                (row + prompt.offset, p[b, h, row])
                for row in range(max(prompt.q_len - last_q, 0), prompt.q_len)
                if row + prompt.offset >= reference.padding_of(prompt, b)
            ]
            for h in range(q.shape[1])
        ]
        for b in range(q.shape[0])
    ]


def columns_and_distances(rows, n_tokens, vertical, slash):
    """The published selection by token: the kept key columns and the kept distances of one head, as sets.

    The first 30 columns and the first 100 distances are always kept and count towards the sizes.
    """
    columns, distances = torch.zeros(2, n_tokens, dtype=torch.float64)
    for position, row in rows:
        columns += row
        distances[: position + 1] += row[: position + 1].flip(0)
    columns, distances = columns.tolist(), distances.tolist()
    columns[:30] = [math.inf] * min(30, n_tokens)
    distances[:100] = [math.inf] * min(100, n_tokens)
    return reference.largest(columns, max(vertical, 30)), reference.largest(distances, max(slash, 100))


def blocks_of(size, tokens_in_prompt, prompt):
    return prompt.n_k if size >= tokens_in_prompt else math.ceil(size / prompt.block_size)


def masses(rows, prompt):
    """The attention mass of the rows on each key block and on each block diagonal: two lists of n_k."""
    columns, diagonals = [0.0] * prompt.n_k, [0.0] * prompt.n_k
    for position, row in rows:
        own = position // prompt.block_size
        for j in range(own + 1):
            keys = reference.key_block(prompt, j)
            mass = row[keys.start : keys.stop].sum().item()
            columns[j] += mass
            diagonals[own - j] += mass
    return columns, diagonals


def vertical_slash(rows, b, prompt, vertical, slash):
    """Kept blocks (i, j) of one head: the columns and block diagonals with the most mass."""
    length = prompt.kv_len - reference.padding_of(prompt, b)
    columns, diagonals = masses(rows, prompt)
    columns = reference.largest(columns, blocks_of(vertical, length, prompt))
    diagonals = reference.largest(diagonals, blocks_of(slash, length, prompt))
    kept = set()
    for i in range(prompt.n_q):
        for row in reference.query_block(prompt, i):
            own = (row + prompt.offset) // prompt.block_size
            kept |= {(i, j) for j in range(prompt.n_k) if j in columns or own - j in diagonals}
    return kept


def a_shape(b, prompt, first, near):
    start = reference.padding_of(prompt, b)
    return {
        (i, j)
        for i in range(prompt.n_q)
        for j in range(prompt.n_k)
        for keys in [reference.key_block(prompt, j)]
        if any(start <= key < start + first for key in keys)
        or reference.query_block(prompt, i).start + prompt.offset - (keys.stop - 1) < near
    }


def block_sparse(pooled, seen, b, prompt, blocks):
    length = prompt.kv_len - reference.padding_of(prompt, b)
    count = blocks_of(64 * blocks, length, prompt)
    kept = set()
    for i in range(prompt.n_q):
        row = [pooled[i, j].item() if seen[i, j] else -1 for j in range(prompt.n_k)]
        kept |= {(i, j) for j in reference.largest(row, count)}
    return kept


def plain_loops(q, k, prompt, patterns, last_q=64):
    """Keep table of heads with ``patterns``, a list of (type, size, size), including the own blocks."""
    rows, pooled = last_rows(q, k, prompt, last_q), reference.pooled_attention(q, k, prompt)
    seen, own = reference.visible(prompt, len(q)), reference.diagonal(prompt, len(q))
    keep = torch.zeros(*q.shape[:2], prompt.n_q, prompt.n_k, dtype=torch.bool)
    for b in range(q.shape[0]):
        for h, (kind, *sizes) in enumerate(patterns):
            if kind == "vertical_and_slash":
                kept = vertical_slash(rows[b][h], b, prompt, *sizes)
            elif kind == "stream_llm":
                kept = a_shape(b, prompt, *sizes)
            else:
                kept = block_sparse(pooled[b, h], seen[b, 0], b, prompt, sizes[0])
            for i, j in kept:
                keep[b, h, i, j] = True
    return (keep | own) & seen


MIXED = [
    ("vertical_and_slash", 30, 50),
    ("block_sparse", 1, 0),
    ("vertical_and_slash", 100, 17),
    ("stream_llm", 20, 40),
    ("vertical_and_slash", 1000, 1),
    ("stream_llm", 33, 0),
]


@every_prompt
@pytest.mark.parametrize("last_q", [20, 64])
def test_heads_of_all_types_and_budgets_equal_plain_loops(sizes, last_q):
    q, k, prompt = inputs(**sizes)
    keep = minference(heads=dict(enumerate(MIXED)), last_q=last_q).keep(q, k, prompt)
    assert torch.equal(keep.expand(len(q), -1, -1, -1), plain_loops(q, k, prompt, MIXED, last_q))


def test_on_these_inputs_every_head_skips_blocks_except_the_one_with_a_budget_of_the_whole_prompt():
    q, k, prompt = inputs(q_len=333)
    keep = minference(heads=dict(enumerate(MIXED))).keep(q, k, prompt)
    skipped = (prompt.visible() & ~keep).any((2, 3))[0]
    assert skipped.tolist() == [True, True, True, True, False, True]


@pytest.mark.parametrize(("pattern", "vertical", "slash"), MIXED[:4])
def test_heads_that_are_not_listed_use_the_default_pattern(pattern, vertical, slash):
    q, k, prompt = inputs(q_len=150)
    keep = minference(pattern=pattern, vertical=vertical, slash=slash, heads={2: MIXED[0]}).keep(q, k, prompt)
    patterns = [MIXED[0] if head == 2 else (pattern, vertical, slash) for head in range(6)]
    assert torch.equal(keep, plain_loops(q, k, prompt, patterns))


@pytest.mark.parametrize(("pattern", "first", "second"), [("vertical_and_slash", 50, 50), ("block_sparse", 50 / 64, 0)])
def test_sizes_default_to_an_eighth_of_each_prompt_of_a_batch(pattern, first, second):
    q, k, prompt = inputs(q_len=400, batch=2, heads=2, kv_heads=1, left_padding=[0, 240])
    keep = minference(pattern=pattern).keep(q, k, prompt)
    for b, share in ((0, 1), (1, 0.4)):  # 400 tokens and 160
        want = plain_loops(q, k, prompt, [(pattern, first * share, second * share)] * 2)
        assert torch.equal(keep[b], want[b])


def test_the_default_sizes_are_at_most_the_published_ones():
    prompt = sp.Prompt(q_len=16, kv_len=100_000)
    q, k = torch.zeros(1, 1, 16, 64), torch.zeros(1, 1, 100_000, 64)
    for pattern, published in (
        ("vertical_and_slash", {"vertical": 1000, "slash": 6096}),
        ("block_sparse", {"vertical": 100}),
    ):
        default = minference(128, pattern=pattern).keep(q, k, prompt)
        assert torch.equal(default, minference(128, pattern=pattern, **published).keep(q, k, prompt))


def test_the_default_a_shape_is_the_published_one():
    q, k, prompt = inputs(q_len=1200)
    keep = minference(pattern="stream_llm").keep(q, k)
    want = (prompt.sink_blocks(100) | prompt.local_blocks(800)) & prompt.visible()
    assert torch.equal(keep, want.expand_as(keep))


@pytest.mark.parametrize("tokens", [300, 333])
def test_the_default_guards_are_the_published_windows(tokens):
    q, k, prompt = inputs(q_len=tokens)
    keep = sp.get_strategy("minference", vertical=0, slash=0, block_size=16).keep(q, k)
    want = torch.zeros(prompt.n_q, prompt.n_k, dtype=torch.bool)
    for i in range(prompt.n_q):
        for j in range(i + 1):
            want[i, j] = 16 * j < 30 or 16 * i - (16 * j + 15) < 100
    assert torch.equal(keep, want.expand_as(keep))


# Properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [s for s in PROMPTS.values() if s["q_len"] > 5])
def test_the_blocks_of_the_published_columns_and_diagonals_cover_the_published_token_mask(sizes):
    q, k, prompt = inputs(**sizes)
    batch, n, size = len(q), prompt.kv_len, prompt.block_size
    tokens = reference.token_mask(prompt, batch)
    for b, heads in enumerate(last_rows(q, k, prompt)):
        columns, distances = columns_and_distances(heads[0], n, vertical=40, slash=110)
        columns = {key // size for key in columns}
        diagonals = {distance // size for distance in distances} | {-(-distance // size) for distance in distances}
        column = torch.tensor([j in columns for j in range(prompt.n_k)])
        diagonal = torch.tensor([j in diagonals for j in range(prompt.n_k)])
        table = column | by_diagonal(diagonal[None, None], prompt)[0, 0]
        kept = columns_and_distances(heads[0], n, vertical=40, slash=110)
        for row, key in tokens[b].nonzero().tolist():
            if key in kept[0] or row + prompt.offset - key in kept[1]:
                assert table[row // size, key // size]


@pytest.mark.parametrize("scale", [0.1, 100])
@pytest.mark.parametrize("padding", [0, 47])  # after 47 tokens of padding, 64 tokens lie in five blocks
@pytest.mark.parametrize("tokens", [64, 129, 200])
def test_a_size_of_the_whole_prompt_keeps_all_blocks(tokens, padding, scale):
    q, k, prompt = inputs(q_len=tokens + padding, scale=scale, left_padding=[padding])
    everything = prompt.visible().expand(1, 6, -1, -1)
    for options in (
        {"vertical": tokens, "slash": 0},
        {"vertical": 0, "slash": tokens},
        {"pattern": "block_sparse", "vertical": -(-tokens // 64)},
    ):
        assert torch.equal(minference(**options).keep(q, k, prompt), everything)


@pytest.mark.parametrize("options", [{"vertical": 64, "slash": 0}, {"pattern": "block_sparse", "vertical": 1}])
def test_among_blocks_without_mass_the_earliest_real_ones_are_kept(options):
    q, k, prompt = inputs(q_len=248, scale=1000, left_padding=[48])
    strategy = minference(last_q=1, **options)  # one query, which attends to one key
    padded, unpadded = strategy.keep(q, k, prompt), strategy.keep(q[:, :, 48:], k[:, :, 48:])
    assert torch.equal(padded[..., 3:, 3:], unpadded)


@given(column=st.integers(0, 180), seed=a_seed)
def test_a_planted_column_is_found(column, seed):
    q, k, prompt = inputs(q_len=250, scale=0.5, seed=seed)
    k[:, :, column] = 10
    q += 1
    keep = minference(vertical=1, slash=0).keep(q, k, prompt)
    assert keep[:, :, column // 16 :, column // 16].all()


@given(blocks=st.integers(0, 12), seed=a_seed)
def test_a_planted_diagonal_is_found(blocks, seed):
    n = 256
    source = torch.Generator().manual_seed(seed)
    positions = torch.randn(n, 64, generator=source)
    k = 3 * positions.expand(1, 2, n, 64)
    q = 3 * positions.roll(16 * blocks, 0).expand(1, 2, n, 64)  # each query equals the key 16 * blocks before it
    keep = minference(vertical=0, slash=1).keep(q, k, sp.Prompt(n, block_size=16))
    assert keep.diagonal(-blocks, 2, 3).all()
    assert keep.sum() == 2 * (16 + (16 - blocks if blocks else 0))


@given(small=st.integers(0, 200), more=st.integers(0, 200), seed=a_seed)
def test_larger_sizes_keep_a_superset(small, more, seed):
    q, k, prompt = inputs(q_len=200, seed=seed)
    for options in ({"pattern": "vertical_and_slash"}, {"pattern": "stream_llm"}):
        less = minference(vertical=small, slash=small, **options).keep(q, k, prompt)
        most = minference(vertical=small + more, slash=small + more, **options).keep(q, k, prompt)
        assert not (less & ~most).any()


def test_a_chunk_is_selected_by_its_last_queries():
    q, k, prompt = inputs(q_len=320)
    strategy = minference(vertical=32, slash=32)
    whole, chunk = strategy.keep(q, k, prompt), strategy.keep(q[:, :, 160:], k)
    assert torch.equal(chunk, whole[:, :, 10:])  # both have the same last queries
    assert not torch.equal(strategy.keep(q[:, :, :160], k[:, :, :160]), whole[:, :, :10, :10])
    assert not strategy.chunk_invariant


@pytest.mark.parametrize("pattern", ["vertical_and_slash", "block_sparse", "stream_llm"])
def test_packed_documents_are_supported_except_by_vertical_slash_heads(pattern):
    q, k, _ = reference.random_qkv(q_len=160, scale=4)
    prompt = sp.Prompt(q_len=160, block_size=16, documents=[0] * 96 + [1] * 64)
    strategy = minference(pattern=pattern, vertical=1, slash=20)
    if pattern == "vertical_and_slash":
        with pytest.raises(ValueError, match="minference cannot make one table for packed documents"):
            strategy.keep(q, k, prompt)
    else:
        keep = strategy.keep(q, k, prompt)
        for blocks in (slice(0, 6), slice(6, 10)):
            tokens = slice(blocks.start * 16, blocks.stop * 16)
            assert torch.equal(keep[..., blocks, blocks], strategy.keep(q[:, :, tokens], k[:, :, tokens]))


def test_the_score_table_holds_the_scores_of_each_head_s_type():
    q, k, prompt = inputs(q_len=150)
    strategy = minference(heads=dict(enumerate(MIXED)))
    table = strategy.score_table(strategy.score(q, k, prompt), prompt)
    vertical, slash, *_ = sp.get_estimator("representative", queries=64)(q, k, prompt)
    assert table.shape == (1, 6, prompt.n_q, prompt.n_k)
    assert torch.equal(table[:, 1], sp.get_estimator("pooled_attention")(q, k, prompt)[:, 1])
    assert torch.equal(table[0, 0, 5, 2], torch.maximum(vertical[0, 0, 2], slash[0, 0, 3]))
    assert (table[:, 3] == 0).all()
    only_a_shape = minference(pattern="stream_llm")
    assert (only_a_shape.score_table(only_a_shape.score(q, k, prompt), prompt) == 0).all()


# Bugs of the released code that this one avoids -----------------------------------------------------------


def test_each_row_of_a_batch_gets_separate_columns_and_diagonals():
    q, k, prompt = inputs(q_len=200, batch=3)
    strategy = minference(heads=dict(enumerate(MIXED)))
    keep = strategy.keep(q, k, prompt)
    rows = [strategy.keep(q[b : b + 1], k[b : b + 1], prompt) for b in range(3)]
    assert torch.equal(keep, torch.cat(rows))
    assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("slash", [0, 1, 50, 99])
def test_slash_sizes_smaller_than_the_window_keep_the_whole_window(slash):
    q, k, prompt = inputs(q_len=333)
    q[:, :, -64:] = 20 * k[:, :1, 1:2]  # the last queries attend only to a distant token
    keep = sp.get_strategy("minference", vertical=30, slash=slash, block_size=16).keep(q, k)
    assert not (prompt.local_blocks(100) & prompt.visible() & ~keep).any()
    assert not (
        minference(slash=slash, vertical=0).keep(q, k) ^ plain_loops(q, k, prompt, [(*MIXED[0][:1], 0, slash)] * 6)
    ).any()


@pytest.mark.parametrize("tokens", [64, 128, 192])
def test_prompts_of_whole_blocks_get_no_empty_block_after_them(tokens):
    q, k, prompt = inputs(q_len=tokens, scale=50)
    k -= 3  # a block of zeros would score highest for positive queries
    q = q.abs()
    keep = minference(pattern="block_sparse", vertical=1).keep(q, k)
    assert keep.shape[2:] == (tokens // 16, tokens // 16)
    assert (keep[:, :, -1].sum(-1) >= min(4, tokens // 16)).all()
    assert torch.equal(keep, plain_loops(q, k, prompt, [("block_sparse", 1, 0)] * 6))


def test_a_partial_last_block_is_pooled_over_its_real_keys_only():
    q, k, prompt = inputs(q_len=49, heads=1, kv_heads=1)
    q[:], k[:, :, :48], k[:, :, 48:] = 1, torch.arange(48)[:, None] // 16 * 0.1, 0.5
    keep = minference(pattern="block_sparse", vertical=1).keep(q, k)
    assert keep[0, 0, 3].all()  # 64 tokens cover all four blocks
    pooled = sp.get_estimator("pooled_attention")(q, k, prompt)[0, 0, 3]
    assert pooled.argmax() == 3  # a mean over 16 slots would be the second lowest
    assert pooled[3] > 1.5 * pooled[2]


def test_block_sparse_heads_keep_their_own_blocks():
    q, k, prompt = inputs(q_len=200)
    k[:, :, :64] = 10 * q.sign().mean((1, 2), keepdim=True).sign()
    q[:] = q.abs() * k[:, :1, :1].sign()  # every query prefers the first four blocks
    keep = minference(pattern="block_sparse", vertical=1).keep(q, k)
    for i in range(4, prompt.n_q):
        assert keep[0, 0, i].nonzero()[:, 0].tolist() == [0, 1, 2, 3, i]


@pytest.mark.parametrize("kv_len", [1, 17, 205])
def test_a_single_query_keeps_diagonals_too(kv_len):
    q, k, prompt = inputs(q_len=1, kv_len=kv_len)
    keep = minference(vertical=0, slash=20).keep(q, k)
    assert torch.equal(keep, plain_loops(q, k, prompt, [("vertical_and_slash", 0, 20)] * 6))


# Pattern files --------------------------------------------------------------------------------------------

PUBLISHED = [
    {"0": ["vertical_and_slash", 1000, 6096, 336382.0], "1": ["stream_llm", 100, 800, 0.98]},
    {},
    {"0": ["vertical_and_slash", 30, 800, 1], "5": ["block_sparse", 100, 1, 0]},
]


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(PUBLISHED))
    return path


def test_a_pattern_file_is_unchanged_by_reading_and_writing(published, tmp_path):
    layers = load_patterns(published)
    assert layers[0][1] == HeadPattern("stream_llm", 100, 800, 0.98)
    assert [sorted(layer) for layer in layers] == [[0, 1], [], [0, 5]]
    save_patterns(tmp_path / "copy.json", layers)
    assert json.loads((tmp_path / "copy.json").read_text()) == PUBLISHED
    assert load_patterns(tmp_path / "copy.json") == layers


heads = st.dictionaries(
    st.integers(0, 31),
    st.tuples(
        st.sampled_from(["vertical_and_slash", "stream_llm", "block_sparse"]),
        st.integers(0, 30_000),
        st.integers(0, 30_000),
        st.floats(0, 1e6),
    ),
    max_size=3,
)


@given(layers=st.lists(heads, max_size=3))
def test_patterns_are_unchanged_by_writing_and_reading(layers, tmp_path_factory):
    path = tmp_path_factory.mktemp("patterns") / "patterns.json"
    save_patterns(path, layers)
    assert load_patterns(path) == layers


def test_each_layer_of_a_config_uses_the_patterns_of_its_heads(published):
    q, k, prompt = inputs(q_len=333, scale=2)
    strategy = minference(config=str(published), local=20)
    unlisted = ("vertical_and_slash", 1000, 6096)
    for index, layer in enumerate(PUBLISHED):
        bound = strategy.for_layer(sp.Layer(index, 3))
        assert (bound.local, bound.block_size) == (20, 16)
        patterns = [tuple(layer[str(h)][:3]) if str(h) in layer else unlisted for h in range(6)]
        want = plain_loops(q, k, prompt, patterns) | prompt.local_blocks(20) & prompt.visible()
        assert torch.equal(bound.keep(q, k), want)
    assert sp.Plan(default=strategy).for_layer(sp.Layer(2, 3)) == bound


def test_a_strategy_with_patterns_is_rebuilt_from_its_configuration(published):
    for strategy in (minference(config=published), minference(heads=dict(enumerate(MIXED)), pattern="stream_llm")):
        assert sp.strategy.as_strategy(sp.strategy.to_config(strategy)) == strategy
        bound = strategy.for_layer(sp.Layer(0, 3))
        assert sp.strategy.as_strategy(json_keys(sp.strategy.to_config(bound))) == bound


def json_keys(config):
    return {**config, "heads": {int(head): list(pattern) for head, pattern in config["heads"].items()}}


def test_a_config_needs_its_layer_and_the_right_number_of_layers(published):
    q, k, _ = inputs(q_len=40)
    strategy = minference(config=published)
    with pytest.raises(ValueError, match=r"which layer it serves: take strategy\.for_layer"):
        strategy.keep(q, k)
    with pytest.raises(ValueError, match="patterns for 3 layers, but the model has 32"):
        strategy.for_layer(sp.Layer(0, 32))
    with pytest.raises(ValueError, match="pattern for head 5, but q has 4 heads"):
        strategy.for_layer(sp.Layer(2, 3)).keep(q[:, :4], k)
    for option in ({"heads": {0: MIXED[0]}}, {"pattern": "stream_llm"}, {"vertical": 100}, {"slash": 100}):
        with pytest.raises(ValueError, match="config holds the patterns of all heads"):
            minference(config=published, **option)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "it isn't JSON"),
        ('[{"0": ["stream_llm", 1, 2, 0], "0": ["stream_llm", 1, 2, 0]}]', "gives the key '0' twice"),
        ('[{"0": {"type": "stream_llm"}}]', "head 0 must have"),
        ("", "it isn't JSON"),
        ("{}", "list over layers"),
        ("[[]]", "list over layers"),
        ('[{"one": ["stream_llm", 1, 2, 0]}]', "number its heads from 0, got 'one'"),
        ('[{"-1": ["stream_llm", 1, 2, 0]}]', "number its heads from 0, got '-1'"),
        ('[{}, {"3": ["streaming", 1, 2, 0]}]', "layer 1: the type of head 3 must be one of vertical_and_slash"),
        ('[{"3": ["stream_llm", 1.5, 2, 0]}]', "a size of head 3 must be a whole number"),
        ('[{"3": ["stream_llm", 1, null, 0]}]', "a size of head 3 must be a whole number"),
        ('[{"3": ["stream_llm", 1, 2, "good"]}]', "score of head 3 must be a number"),
        ('[{"3": ["stream_llm", 1]}]', r"head 3 must have \[type, size, size, score\]"),
        ('[{"3": 5}]', r"head 3 must have \[type, size, size, score\]"),
    ],
)
def test_invalid_pattern_files_are_refused(content, message, tmp_path):
    path = tmp_path / "patterns.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        minference(config=path)


def test_the_error_for_a_missing_file_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"no pattern file at .*nowhere\.json"):
        minference(config=tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "vertical"}, "pattern must be one of vertical_and_slash, stream_llm, block_sparse"),
        ({"vertical": -1}, "vertical must be a whole number"),
        ({"slash": 1.5}, "slash must be a whole number"),
        ({"last_q": 0}, "last_q must be a whole number, 1 or more"),
        ({"heads": {"0": MIXED[0]}}, "heads must be numbered from 0, got '0'"),
        ({"heads": {True: MIXED[0]}}, "heads must be numbered from 0"),
        ({"heads": {0: ("stream_llm", True, 2)}}, "a size of head 0 must be a whole number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        minference(**options)


# The estimator's number of queries --------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [5, 64])
@every_prompt
def test_representative_masses_are_the_attention_of_the_given_number_of_last_queries(sizes, queries):
    q, k, prompt = inputs(**sizes)
    got = sp.get_estimator("representative", queries=queries)(q, k, prompt)
    for b, heads in enumerate(last_rows(q, k, prompt, queries)):
        for h, rows in enumerate(heads):
            for mass, want in zip(got[:2], masses(rows, prompt), strict=True):
                want = torch.tensor(want) / max(len(rows), 1)
                torch.testing.assert_close(mass[b, h], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("option", ["queries", "stride"])
@pytest.mark.parametrize("number", [0, -1, True, 1.5])
def test_a_number_of_queries_out_of_range_is_refused(option, number):
    with pytest.raises(ValueError, match=f"{option} must be a whole number, 1 or more"):
        sp.get_estimator("representative", **{option: number})

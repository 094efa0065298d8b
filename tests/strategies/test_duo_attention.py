"""DuoAttention and LServe: which heads stream, and which blocks streaming and retrieval heads keep."""

import math
from dataclasses import dataclass, replace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_parts import SCRATCH, long_prompt

import sparse_prefill as sp
from sparse_prefill.core import tensor_checks
from sparse_prefill.head_table import load_table, save_table, streaming_heads, window_loss
from sparse_prefill.strategies.a_shape import AShape
from sparse_prefill.strategy import as_strategy, to_config

TABLE = [[0.9, 0.1], [0.2, 0.8], [0.5, 0.3]]
NAMES = ["duo_attention", "lserve"]
both = pytest.mark.parametrize("name", NAMES)


def duo(name="duo_attention", sink=16, local=32, **options):
    return sp.get_strategy(name, block_size=16, min_length=0, sink=sink, local=local, **options)


PROMPTS = {
    "63": {"q_len": 63},
    "333": {"q_len": 333},
    "batch": {"q_len": 129, "batch": 2},
    "chunk off the grid": {"q_len": 41, "kv_len": 205},
    "padding": {"q_len": 150, "batch": 2, "padding": [37, 0]},
}
every_prompt = pytest.mark.parametrize("sizes", PROMPTS.values(), ids=PROMPTS)


def inputs(padding=None, **sizes):
    q, k, v = reference.random_qkv(**sizes)
    return q, k, v, sp.Prompt(q.shape[2], k.shape[2], 16, padding)


# Kept blocks ----------------------------------------------------------------------------------------------


@every_prompt
@both
def test_streaming_heads_keep_the_window_and_retrieval_heads_all_blocks(name, sizes):
    q, k, _, prompt = inputs(**sizes)
    keep = duo(name, streaming=[True, False], sink=20, local=40).keep(q, k, prompt)
    seen = reference.visible(prompt, len(q))

    def window(b, rows, keys):
        start, own = reference.padding_of(prompt, b), rows.start + prompt.offset
        return any(start <= key < start + 20 for key in keys) or own - (keys.stop - 1) < 40

    want = reference.block_table(prompt, len(q), window) & seen
    assert keep.shape == (prompt.batch, 6, prompt.n_q, prompt.n_k)
    keep = keep.expand(len(q), -1, -1, -1)
    assert torch.equal(keep[:, :3], want.expand(-1, 3, -1, -1))
    assert torch.equal(keep[:, 3:], seen.expand(-1, 3, -1, -1))


def test_retrieval_heads_equal_dense_heads_bit_for_bit():
    q, k, v, prompt = inputs(q_len=333)
    out = sp.sparse_attention(q, k, v, duo(streaming=[True, False]))
    dense = sp.block_sparse_attention(q, k, v, prompt.visible(), prompt=prompt)
    assert torch.equal(out[:, 3:], dense[:, 3:])
    assert (out[:, :3] - dense[:, :3]).abs().max() > 0.01


@given(tokens=st.integers(1, 400), sink=st.integers(0, 60), local=st.integers(1, 100))
def test_a_streaming_row_keeps_the_blocks_of_its_window(tokens, sink, local):
    q, k, _, prompt = inputs(q_len=tokens, heads=2, kv_heads=1)
    count = duo(sink=sink, local=local).keep(q, k).sum(-1)[0, 0]
    width = math.ceil(sink / 16) + math.ceil((local + 15) / 16)
    assert count.tolist() == [min(i + 1, width) for i in range(prompt.n_q)]


@given(tokens=st.integers(17, 400), sink=st.integers(0, 400), data=st.data())
def test_a_window_as_long_as_the_prompt_is_dense(tokens, sink, data):
    q, k, _, prompt = inputs(q_len=tokens, heads=2, kv_heads=1)
    strategy = duo(sink=sink, local=max(0, tokens - sink) + data.draw(st.integers(0, 9)))
    assert torch.equal(strategy.keep(q, k), prompt.visible().expand(1, 2, -1, -1))
    assert strategy.dense_reason(prompt) == "window"
    assert replace(strategy, retrieval="flex_prefill").dense_reason(prompt) is None


def test_the_default_window_of_lserve_is_dense_up_to_8320_tokens():
    assert sp.get_strategy("lserve").dense_reason(sp.Prompt(8320)) == "window"
    assert sp.get_strategy("lserve").dense_reason(sp.Prompt(8321)) is None
    assert sp.get_strategy("duo_attention").dense_reason(sp.Prompt(8192)) is None


def test_a_whole_prompt_is_sparse_and_chunks_select_the_same_blocks():
    q, k, _, _ = inputs(q_len=333)
    strategy = duo(streaming=[True, False])
    whole = strategy.keep(q, k)
    assert not whole[:, :3, 8:].all(-1).any()
    for begin in range(0, 333, 96):
        end = min(begin + 96, 333)
        part = strategy.keep(q[:, :, begin:end], k[:, :, :end])
        assert torch.equal(part, whole[:, :, begin // 16 : -(-end // 16), : part.shape[3]])


@given(order=st.permutations(range(4)), streaming=st.lists(st.booleans(), min_size=4, max_size=4))
def test_heads_may_be_in_any_order(order, streaming):
    q, k, _, _ = inputs(q_len=150, heads=8, kv_heads=4)
    moved = [2 * head + i for head in order for i in (0, 1)]
    keep = duo(streaming=streaming).keep(q, k)
    assert torch.equal(duo(streaming=[streaming[i] for i in order]).keep(q, k), keep[:, moved])


# Which heads ----------------------------------------------------------------------------------------------

tables = st.integers(1, 4).flatmap(
    lambda heads: st.lists(st.lists(st.floats(0, 1, width=16), min_size=heads, max_size=heads), min_size=1, max_size=6)
)


@given(table=tables, sparsity=st.floats(-0.5, 1.5))
def test_the_lowest_heads_of_the_whole_table_stream_and_their_number_matches_the_sparsity(table, sparsity):
    flags = streaming_heads(table, sparsity)
    low = [x for row, marks in zip(table, flags, strict=True) for x, mark in zip(row, marks, strict=True) if mark]
    high = [x for row, marks in zip(table, flags, strict=True) for x, mark in zip(row, marks, strict=True) if not mark]
    assert max(low, default=-1) <= min(high, default=2)
    assert abs(len(low) - min(max(sparsity, 0), 1) * (len(low) + len(high))) <= 1


@given(st.permutations([i / 16 for i in range(12)]), st.floats(0.01, 0.99))
def test_heads_with_distinct_scores_are_divided_at_the_quantile(numbers, sparsity):
    table = torch.tensor(numbers, dtype=torch.float64).view(3, 4)
    want = table < table.quantile(sparsity)
    assert torch.equal(torch.tensor(streaming_heads(table.tolist(), sparsity)), want)


def test_among_heads_with_equal_scores_the_later_ones_stream():
    assert streaming_heads([[1.0, 1.0], [1.0, 1.0]], 0.5) == ((False, False), (True, True))
    assert streaming_heads([[1.0, 0.0], [1.0, 1.0]], 0.25) == ((False, True), (False, False))


@both
def test_each_layer_gets_its_row_of_the_table(name, tmp_path):
    save_table(TABLE, tmp_path / "heads.tsv")
    for table in (TABLE, tmp_path / "heads.tsv", str(tmp_path / "heads.tsv")):
        strategy = duo(name, table=table, sparsity=0.5)
        bound = [strategy.for_layer(sp.Layer(i, 3)) for i in range(3)]
        assert [layer.streaming for layer in bound] == [(False, True), (True, False), (False, True)]
        assert bound[0].for_layer(sp.Layer(1, 3)).streaming == (True, False)
        assert as_strategy(to_config(strategy)) == strategy
        assert as_strategy(to_config(bound[1])) == bound[1]
    assert all(flag for i in range(3) for flag in duo(table=TABLE, sparsity=1).for_layer(sp.Layer(i, 3)).streaming)
    assert not any(flag for i in range(3) for flag in duo(table=TABLE, sparsity=0).for_layer(sp.Layer(i, 3)).streaming)


@both
def test_without_a_table_models_are_refused_and_direct_calls_stream_in_all_heads(name):
    with pytest.raises(ValueError, match=f"{name} needs a table"):
        duo(name).for_layer(sp.Layer(0, 2))
    q, k, _, _ = inputs(q_len=150)
    assert torch.equal(duo(name).keep(q, k), duo("a_shape").keep(q, k).expand(1, 6, -1, -1))
    assert duo(name, streaming=[True, False]).for_layer(sp.Layer(0, 2)).streaming == (True, False)


def test_a_table_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 3 layers and the model 4"):
        duo(table=TABLE).for_layer(sp.Layer(0, 4))
    q, k, _, _ = inputs(q_len=150, kv_heads=3)
    with pytest.raises(ValueError, match="which of 2 key heads stream, but k has 3"):
        duo(table=TABLE).for_layer(sp.Layer(0, 3)).keep(q, k)
    with pytest.raises(ValueError, match="no table of heads at"):
        duo(table=tmp_path / "none.tsv").for_layer(sp.Layer(0, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": -0.1}, "sparsity must be"),
        ({"sparsity": math.nan}, "sparsity must be"),
        ({"table": []}, "a row for each layer"),
        ({"table": [[0.1], [0.1, 0.2]]}, "a row for each layer"),
        ({"table": [["a"]]}, "each number of table must be a finite number"),
        ({"table": [[math.inf]]}, "a finite number"),
        ({"table": 3}, "a row for each layer"),
        ({"streaming": [1, 0]}, "True or False for each key head"),
        ({"streaming": []}, "True or False for each key head"),
        ({"retrieval": {"name": "dense", "block_size": 64}}, "share one block size"),
        ({"retrieval": "nonsense"}, "Unknown strategy"),
        ({"retrieval": None}, "a name, or a mapping"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        duo(**options)


# Retrieval heads ------------------------------------------------------------------------------------------


def test_retrieval_heads_may_run_any_strategy_and_get_no_window():
    q, k, v, prompt = inputs(q_len=333, scale=4)
    pooled = sp.get_strategy("mean_pool", share=0.5, block_size=16)
    for retrieval in ({"name": "mean_pool", "share": 0.5}, pooled):
        strategy = duo(streaming=[True, False], retrieval=retrieval, local=200)
        keep = strategy.keep(q, k)
        assert torch.equal(keep[:, 3:], pooled.keep(q[:, 3:], k[:, 1:]))
        scores = strategy.score(q, k, prompt)
        assert not (strategy.select(scores, prompt) & ~keep & prompt.visible()).any()
        assert strategy.score_table(scores, prompt).shape == keep.shape
    out = sp.sparse_attention(q, k, v, strategy)
    torch.testing.assert_close(out.double(), reference.sparse_attention(q, k, v, keep, prompt), rtol=0, atol=1e-5)


def test_retrieval_heads_of_a_key_head_are_selected_as_a_group():
    q, k, _, _ = inputs(q_len=333, scale=8, heads=8, kv_heads=4)
    flash = {"name": "flash_prefill", "alpha": 0.5, "per_group": True, "sink": 0, "local": 0, "last": 0}
    keep = duo(streaming=[True, False, True, False], retrieval=flash).keep(q, k)
    whole = duo(streaming=[False] * 4, retrieval=flash).keep(q, k)
    for heads in (slice(2, 4), slice(6, 8)):
        assert torch.equal(keep[:, heads], whole[:, heads])
    per_head = as_strategy({**flash, "block_size": 16, "per_group": False}).keep(q, k)
    assert not torch.equal(whole, per_head)


@pytest.mark.parametrize("streaming", [[False, True] * 4, [True] * 4 + [False] * 4])
def test_long_prompts_with_both_kinds_of_heads_fit_in_memory(streaming, monkeypatch):
    monkeypatch.setattr(tensor_checks, "_check_has_values", lambda *tensors: None)
    peak, syncs = long_prompt(sp.get_strategy("duo_attention", streaming=streaming).keep)
    assert peak < SCRATCH
    assert not syncs


def test_a_retrieval_strategy_gets_the_block_size_and_sets_chunk_invariance():
    assert duo(retrieval="flex_prefill").retrieval.block_size == 16
    assert duo().chunk_invariant
    assert not duo(retrieval="flex_prefill").chunk_invariant
    assert replace(duo(retrieval="flex_prefill"), retrieval="mean_pool").chunk_invariant


def test_the_strategy_of_retrieval_heads_is_bound_to_the_layer_too():
    @dataclass(frozen=True, kw_only=True)
    class Growing(AShape):
        def for_layer(self, layer):
            return replace(self, local=16 * (layer.index + 1))

    strategy = duo(table=TABLE, retrieval=Growing(block_size=16, sink=0))
    assert [strategy.for_layer(sp.Layer(i, 3)).retrieval.local for i in range(3)] == [16, 32, 48]


# Tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["tsv", "yaml"])
@given(table=tables)
def test_a_table_is_unchanged_by_writing_and_reading(ending, table, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / f"heads.{ending}"
    save_table(table, path)
    assert load_table(path) == tuple(map(tuple, table))


def test_a_table_file_has_a_line_of_tab_separated_numbers_for_each_layer(tmp_path):
    (tmp_path / "heads.tsv").write_text("1.000e+00\t2.5e-01\n0.0\t0.5\n")
    assert load_table(tmp_path / "heads.tsv") == ((1, 0.25), (0, 0.5))


@pytest.mark.parametrize(
    ("name", "text"), [("a.tsv", "0.1\tb\n"), ("a.tsv", ""), ("a.tsv", "1\n1\t2\n"), ("a.yaml", "x: 1"), ("a.yml", "")]
)
def test_the_error_for_an_invalid_table_file_names_it(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        load_table(tmp_path / name)


# Tables without training ----------------------------------------------------------------------------------


@every_prompt
def test_the_loss_of_a_window_is_the_true_attention_mass_outside_it(sizes):
    q, k, _, prompt = inputs(**sizes)
    keep = duo(sink=20, local=40).keep(q, k, prompt).expand(len(q), -1, -1, -1)
    mass = reference.block_mass(q, k, prompt)
    want = (mass * ~keep).sum((-2, -1)).sum(0) / mass.sum((-2, -1)).sum(0)
    found = window_loss(q, k, prompt, sink=20, local=40, query_blocks=range(prompt.n_q))
    assert found == pytest.approx(want.unflatten(0, (2, 3)).mean(1).tolist(), abs=1e-5)


def test_a_head_that_attends_far_back_has_a_high_loss():
    q, k, _, _ = inputs(q_len=1500, heads=4, kv_heads=2)
    k[:, 1, 700:716, 0] = 30  # all queries of the second key head attend to these keys
    q[:, 2:, :, 0] = 10
    loss = window_loss(q, k, sp.Prompt(1500, block_size=16), sink=16, local=64)
    near = window_loss(q, k, sp.Prompt(1500, block_size=16), sink=16, local=1500)
    assert loss[1] > 0.4
    assert near == [0, 0]
    q[:, :2], k[:, 0] = q[:, :2] * 0, 0
    q[:, :2, :, 1], k[:, 0, :16, 1] = 10, 30  # those of the first key head attend to the sink
    loss = window_loss(q, k, sp.Prompt(1500, block_size=16), sink=16, local=64)
    assert loss[0] < 1e-3
    assert streaming_heads([loss], 0.5) == ((True, False),)

"""A Collector gathers the measures of each call."""

import json

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill import evaluation
from sparse_prefill.evaluation import Collector

SMALL = {"block_size": 16, "min_length": 0}
LAYERS = (
    sp.get_strategy("a_shape", sink=16, local=32, **SMALL),
    sp.get_strategy("dense", block_size=16),
    sp.get_strategy("mean_pool", share=0.7, **SMALL),
)
LENGTHS = (100, 130)


def qkv(prompt: int, layer: int, tokens: int):
    return reference.random_qkv(q_len=tokens, scale=3, seed=10 * prompt + layer)


def run(collector: Collector) -> list[sp.Call]:
    """Two prompts through three layers, of which the middle one is dense, each followed by a decoding step."""
    with sp.record(inspect=collector) as calls:
        for i, tokens in enumerate(LENGTHS):
            for step in (None, 1):
                for j, strategy in enumerate(LAYERS):
                    q, k, v = qkv(i, j, tokens)
                    sp.sparse_attention(q[:, :, -1:] if step else q, k, v, strategy)
    return calls


def test_arrays_hold_the_measures_of_each_prompt_layer_and_head():
    collector = Collector(layers=3, heads=6, query_blocks=4)
    calls = [call for call in run(collector) if call.q_len > 1]
    arrays = collector.arrays()
    assert all(values.shape == (2, 3, 6) and values.dtype == torch.float32 for values in arrays.values())
    for i, tokens in enumerate(LENGTHS):
        prompt = sp.Prompt(q_len=tokens, block_size=16)
        blocks = evaluation.spread_blocks(prompt.n_q, 4)
        for j in (0, 2):
            q, k, v = qkv(i, j, tokens)
            keep = LAYERS[j].keep(q, k, prompt).expand(1, 6, -1, -1)
            mass = reference.block_mass(q, k, prompt)[:, :, blocks]
            recall = evaluation.recall(mass, keep, blocks)
            needed = evaluation.oracle_density_by_head(mass, recall.mean(-1) - 1e-7, prompt, blocks)
            out = reference.sparse_attention(q, k, v, keep, prompt)
            expected = {
                "density": calls[3 * i + j].density[0].expand(6),
                "recall": recall[0].mean(-1),
                "worst_recall": recall[0].amin(-1),
                "oracle_density": needed[0],
                "oracle_gap": (evaluation.density(keep, prompt, blocks) / needed)[0],
                "overlap": evaluation.overlap_by_head(mass, keep, prompt, blocks)[0],
                "output_error": evaluation.output_error(q, k, v, out, prompt, blocks)[0],
            }
            assert expected.keys() == arrays.keys()
            for name, values in expected.items():
                torch.testing.assert_close(arrays[name][i, j].double(), values.double(), atol=1e-5, rtol=0, msg=name)
    assert float(arrays["density"].min()) < 1, "blocks were skipped"


def test_dense_calls_are_listed_with_their_reasons_and_count_as_perfect():
    collector = Collector(layers=3, heads=6, query_blocks=4)
    run(collector)
    assert collector.dense_reasons == [[None, "strategy", None]] * 2
    for name, values in collector.arrays().items():
        assert set(values[:, 1].flatten().tolist()) == {0.0 if name == "output_error" else 1.0}, name


def test_the_summary_covers_all_heads_and_can_be_written_as_json():
    collector = Collector(layers=3, heads=6, query_blocks=4)
    run(collector)
    found, arrays = collector.summary(), collector.arrays()
    assert json.loads(json.dumps(found)) == found
    assert found["prompts"] == 2
    assert found["dense_calls"] == {"strategy": 2}
    assert found["density"] == pytest.approx(float(arrays["density"].mean()))
    assert found["recall"] == pytest.approx(float(arrays["recall"].mean()))
    taken = needed = overlap = error = 0.0
    recalls = []
    for i, tokens in enumerate(LENGTHS):
        prompt = sp.Prompt(q_len=tokens, block_size=16)
        blocks = evaluation.spread_blocks(prompt.n_q, 4)
        for j, strategy in enumerate(LAYERS):
            if j == 1:
                taken, needed, overlap = taken + 1 / 6, needed + 1 / 6, overlap + 1 / 6
                recalls += [1.0] * 6 * len(blocks)
                continue
            q, k, v = qkv(i, j, tokens)
            keep = strategy.keep(q, k, prompt)
            mass = evaluation.true_mass(q, k, prompt, blocks)
            recall = evaluation.recall(mass, keep, blocks)
            recalls += recall.flatten().tolist()
            taken += float(evaluation.density(keep, prompt, blocks).mean()) / 6
            needed += evaluation.oracle_density(mass, float(recall.mean()) - 1e-7, prompt, blocks) / 6
            overlap += evaluation.overlap(mass, keep, prompt, blocks) / 6
            out = reference.sparse_attention(q, k, v, keep.expand(1, 6, -1, -1), prompt)
            difference, norm = evaluation.squared_error(q, k, v, out, prompt, blocks)
            error += float((difference.sum() / norm.sum()).sqrt()) / 6
    assert found["oracle_density"] == pytest.approx(needed)
    assert found["oracle_gap"] == pytest.approx(taken / needed)
    assert found["overlap"] == pytest.approx(overlap)
    assert found["output_error"] == pytest.approx(error, abs=1e-5)
    assert found["worst_recall"] == pytest.approx(evaluation.worst(torch.tensor(recalls)), abs=1e-6)


def test_density_and_gap_include_blocks_computed_outside_the_table():
    collectors = [Collector(layers=1, heads=6) for _ in range(2)]
    tables = []

    def inspect(call, seen, prompt):
        collectors[0](call, seen, prompt)
        tables.append(evaluation.density(seen.keep, prompt))
        call.density = tables[0].expand(1, 6) + 0.125  # dense rows and segments
        collectors[1](call, seen, prompt)

    with sp.record(inspect=inspect):
        sp.sparse_attention(*qkv(0, 0, 100), LAYERS[0])
    table, more = (collector.arrays() for collector in collectors)
    torch.testing.assert_close(more["density"], table["density"] + 0.125)
    gap = (more["oracle_gap"] - table["oracle_gap"]) * table["oracle_density"]
    torch.testing.assert_close(gap, torch.full_like(gap, 0.125))
    assert torch.equal(more["recall"], table["recall"])


def test_windows_are_recorded_by_layer():
    collector = Collector(layers=2, heads=6)
    q, k, v = qkv(0, 0, 100)
    with sp.record(inspect=collector):
        for window in (32, None):
            sp.sparse_attention(q, k, v, LAYERS[0], prompt=sp.Prompt(q_len=100, block_size=16, window=window))
    assert collector.windows == [[32, None]]


def test_prompts_that_ran_dense_in_all_layers_have_a_summary():
    collector = Collector(layers=1, heads=6)
    q, k, v = qkv(0, 0, 100)
    with sp.record(inspect=collector):
        sp.sparse_attention(q, k, v, sp.get_strategy("a_shape"))
    assert collector.summary()["dense_calls"] == {"min_length": 1}
    assert collector.summary()["recall"] == collector.summary()["density"] == 1


def test_chunks_of_a_prompt_are_measured_separately():
    collector = Collector(layers=1, heads=6)
    q, k, v = qkv(0, 0, 96)
    with sp.record(inspect=collector) as calls:
        for begin, end in ((0, 48), (48, 96)):
            chunk = q[:, :, begin:end], k[:, :, :end], v[:, :, :end]
            sp.sparse_attention(*chunk, sp.get_strategy("a_shape", sink=16, local=16, **SMALL))
    assert collector.arrays()["recall"].shape == (2, 1, 6)
    densities = [float(call.density.mean()) for call in calls]
    assert collector.arrays()["density"][:, 0, 0].tolist() == pytest.approx(densities)


def test_the_error_is_computed_with_the_soft_cap_and_scale():
    collector = Collector(layers=1, heads=4)
    q, k, v = reference.random_qkv(heads=4, q_len=100, scale=3)
    with sp.record(inspect=collector):
        sp.sparse_attention(q, k, v, sp.get_strategy("oracle", share=1.0, **SMALL), softcap=2.0, scale=0.5)
    assert collector.summary()["output_error"] < 1e-5


def test_calls_that_do_not_match_the_model_are_refused():
    with pytest.raises(ValueError, match="0 calls of attention were collected"):
        Collector(layers=2, heads=6).arrays()
    with pytest.raises(ValueError, match="layers must be a whole number"):
        Collector(layers=0, heads=6)
    half = Collector(layers=2, heads=6)
    q, k, v = qkv(0, 0, 100)
    shape = LAYERS[0]
    with sp.record(inspect=half):
        sp.sparse_attention(q, k, v, shape)
        with pytest.raises(ValueError, match="1 calls of attention were collected"):
            half.summary()
        with pytest.raises(ValueError, match="one prompt at a time, without padding"):
            sp.sparse_attention(q[:, :, :80], k[:, :, :80], v[:, :, :80], shape)
        with pytest.raises(ValueError, match=r"Collector of 6 heads .* got a call of queries .* \[2, 6"):
            sp.sparse_attention(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)), shape)

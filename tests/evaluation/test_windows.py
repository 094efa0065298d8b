"""Models with sliding windows are measured as they run in use, and results list the layers that ran dense."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_hf import write_folder

import sparse_prefill as sp
from sparse_prefill import calibration, tasks
from sparse_prefill.cli import main
from sparse_prefill.cli.evaluate import print_report
from sparse_prefill.evaluation.results import Results
from sparse_prefill.evaluation.run import measure_texts
from sparse_prefill.evaluation.run_frontier import measure_frontier
from sparse_prefill.evaluation.run_times import each_layer, measure_times
from sparse_prefill.evaluation.texts import hide_facts
from sparse_prefill.evaluation.timing import compare_attention, dense_kernels, mean_comparison
from sparse_prefill.models.eval_model import load
from sparse_prefill.models.transformers import sparse

WINDOW = 64
PROSE = "The keeper of the light writes down the wind and the waves each night. " * 40
# In use, 300 tokens run sparse and windows of 64 dense.
SHAPE = sp.get_strategy("a_shape", sink=16, local=32, block_size=16, min_length=128)
EVERYWHERE = replace(SHAPE, min_length=0)
DENSE_LAYERS = {"min_length": [0]}
WINDOWS = {str(WINDOW): [0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "windows", window=WINDOW)


@pytest.fixture(scope="module")
def subject(folder):
    return load(folder)


@pytest.fixture(scope="module")
def text(subject):
    return hide_facts("prose", subject.encode(PROSE), subject.encode, tokens=300)


@pytest.fixture(scope="module")
def rows(subject, text, tmp_path_factory):
    results = Results(tmp_path_factory.mktemp("out") / "report.json", {}, {})
    strategies = {"in use": SHAPE, "shorter": sp.get_strategy("a_shape", sink=16, local=32, block_size=16)}
    assert measure_texts(subject, {**strategies, "everywhere": EVERYWHERE}, [text], results) == {}
    return {row["name"]: row for row in json.loads(results.path.read_text())["rows"]}


def test_texts_run_as_the_model_would_in_use(subject, text, rows):
    with torch.inference_mode(), sparse(subject.model, SHAPE) as stats:
        logits = subject.model(text.tokens[:, :-1], use_cache=False).logits
    assert [layer.dense for _, layer in sorted(stats.layers.items())] == [{"min_length": 1}, {}]
    nll = torch.nn.functional.cross_entropy(logits[0].float(), text.tokens[0, 1:], reduction="none")
    assert rows["in use"]["needle_nll"] == pytest.approx(float(nll[[i - 1 for i in text.answers[0]]].mean()), abs=1e-4)
    assert rows["in use"]["density"] == pytest.approx(stats.density, abs=1e-4)
    # This text is shorter than the default min_length: it runs as a longer one would, in which windows are dense.
    for key in ("needle_nll", "perplexity_ratio_whole", "density", "recall"):
        assert rows["shorter"][key] == pytest.approx(rows["in use"][key], abs=1e-6)
    assert rows["everywhere"]["perplexity_ratio_whole"] != pytest.approx(rows["in use"]["perplexity_ratio_whole"])


def test_rows_list_the_layers_with_windows_and_those_that_ran_dense(rows):
    assert all(row["windows"] == WINDOWS for row in rows.values())
    assert rows["in use"]["dense_layers"] == rows["shorter"]["dense_layers"] == DENSE_LAYERS
    assert rows["everywhere"]["dense_layers"] == {}
    assert rows["dense"]["dense_layers"] == {"strategy": [0, 1]}
    densities = torch.tensor(rows["in use"]["by_head"]["density"])
    assert (densities[0] == 1).all()
    assert (densities[1] < 1).all()


def test_the_printed_table_lists_them(rows, capsys):
    print_report({"rows": list(rows.values())})
    printed = capsys.readouterr().out
    assert "dense layers" in printed.splitlines()[0]
    (line,) = (line for line in printed.splitlines() if line.startswith("in use"))
    assert "1 min_length" in line
    assert "Sliding windows: 64 tokens in layers 0. Those under a strategy's min_length run dense" in printed


def test_the_command_line_prints_and_writes_them(folder, tmp_path, capsys):
    (tmp_path / "prose.txt").write_text(PROSE)
    words = ["eval", "-m", str(folder), "--text", str(tmp_path / "prose.txt"), "--tokens", "300"]
    words += ["-s", "a_shape:sink=16,local=32,block_size=16", "-o", str(tmp_path / "report.json")]
    assert main(words) == 0
    assert "Sliding windows: 64 tokens in layers 0." in capsys.readouterr().out
    row = json.loads((tmp_path / "report.json").read_text())["rows"][1]
    assert (row["windows"], row["dense_layers"]) == (WINDOWS, DENSE_LAYERS)


def test_texts_that_run_dense_in_all_layers_for_another_reason_are_refused(subject, text, tmp_path):
    one_block = {"one block": sp.get_strategy("a_shape", block_size=512)}
    failures = measure_texts(subject, one_block, [text], Results(tmp_path / "report.json", {}, {}))
    assert "ran dense (one block): take longer texts" in failures["one block"]


def test_tasks_are_scored_as_in_use(subject):
    task = tasks.make("niah_single_1", length=400, encode=subject.encode)
    (served,) = tasks.score(subject, SHAPE, [task], generate=False)
    (shorter,) = tasks.score(subject, replace(SHAPE, min_length=None), [task], generate=False)
    (everywhere,) = tasks.score(subject, EVERYWHERE, [task], generate=False)
    (dense,) = tasks.score(subject, "dense", [task], generate=False)
    tokens = torch.tensor([[*task.prompt, *task.answer]])
    found = subject.likelihood(SHAPE, tokens, len(task.answer)).nll[0]
    assert served["nll"] == shorter["nll"] == pytest.approx(float(found[[i for s in task.spans for i in s]].mean()))
    assert everywhere["nll"] != pytest.approx(served["nll"], abs=1e-6)
    assert (served["dense_layers"], served["windows"]) == (DENSE_LAYERS, WINDOWS)
    (_, row) = tasks.summary([{**dense, "strategy": "dense"}, served])
    assert (row["dense_layers"], row["windows"]) == (DENSE_LAYERS, WINDOWS)


def test_a_frontier_measures_layers_as_they_run(subject, text, tmp_path):
    results = Results(tmp_path / "frontier.json", {}, {})
    pool = sp.get_strategy("mean_pool", share=0.5, block_size=16, min_length=128)
    assert measure_frontier(subject, {"pool": pool}, text.tokens, results, query_blocks=4) == {}
    *settings, own = results.content["rows"]
    assert len(settings) > 2
    for row in (*settings, own):
        assert row["dense_layers"] == DENSE_LAYERS
        assert row["windows"] == WINDOWS
        assert row["density"] > 0.5, "one of two layers is dense"
    everywhere = Results(tmp_path / "everywhere.json", {}, {})
    measure_frontier(subject, {"pool": replace(pool, min_length=0)}, text.tokens, everywhere, query_blocks=4)
    last = everywhere.content["rows"][-1]
    assert last["dense_layers"] == {}
    assert last["density"] < own["density"]


def test_layers_are_timed_with_their_windows(subject, text, tmp_path):
    seen = {}

    def measure(index, q, k, v, bound, prompt):
        seen[index] = prompt.window
        with sp.record() as calls:
            out = sp.sparse_attention(q, k, v, bound["shape"], prompt=prompt.on_grid(16))
        assert calls[0].dense == ("min_length" if index == 0 else None)
        if index == 0:
            found = compare_attention(q, k, v, bound, repeats=1, prompt=prompt)
            (row,) = found["strategies"]
            assert (row["density"], row["recall"], row["estimate"], row["ran dense"]) == (1, 1, 0, 1)
            assert mean_comparison([found], bound)["windows"] == [WINDOW]
            torch.testing.assert_close(dense_kernels(q, k, v, prompt)["default"](), out, atol=1e-5, rtol=1e-4)

    each_layer(subject, {"shape": replace(SHAPE, min_length=None)}, text.tokens, measure)
    assert seen == {0: WINDOW, 1: None}
    results = Results(tmp_path / "report.json", {}, {})
    measure_times(subject, {"shape": SHAPE}, text.tokens, results, repeats=1)
    assert results.row("shape")["attention_ms"] > 0


# Calibration


def test_windows_that_run_dense_are_not_calibrated(subject, text):
    pool = sp.get_strategy("mean_pool", block_size=16, min_length=128)
    found = calibration.calibrate(subject, pool, [text.tokens], density=0.6)
    assert {group.layer for group in found.groups} == {1}
    assert found.dense_layers == DENSE_LAYERS
    assert found.density <= 0.6
    served = calibration.verify(subject, found.plan, [text.tokens])
    assert served.windows == (0,)
    assert served.density == pytest.approx(found.density, abs=1e-5)
    assert served.recall == pytest.approx(found.recall, abs=1e-5)
    assert (served.densities[:, 0] == 1).all()


def test_windows_that_run_sparse_in_use_are_calibrated(subject, text):
    pool = sp.get_strategy("mean_pool", block_size=16, min_length=0)
    found = calibration.calibrate(subject, pool, [text.tokens], recall=0.7)
    assert {group.layer for group in found.groups} == {0, 1}
    assert found.dense_layers == {}
    assert calibration.verify(subject, found.plan, [text.tokens]).windows == ()


def test_a_model_whose_layers_are_all_dense_windows_is_refused(subject, text, monkeypatch):
    monkeypatch.setattr(subject.model.config, "layer_types", ["sliding_attention"] * 2)
    for layer in subject.model.model.layers:
        monkeypatch.setattr(layer.self_attn, "sliding_window", WINDOW)
    pool = sp.get_strategy("mean_pool", block_size=16, min_length=128)
    with pytest.raises(ValueError, match=r"runs every layer of windows dense \(min_length\), and there is nothing to"):
        calibration.calibrate(subject, pool, [text.tokens], recall=0.9)

"""The frontier of a model: its points equal those of strategies measured separately."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import reference
import torch
from tiny_gguf import write_gguf

import sparse_prefill as sp
from sparse_prefill import evaluation
from sparse_prefill.calibration import calibrate
from sparse_prefill.evaluation.results import Results
from sparse_prefill.evaluation.run_frontier import DENSITIES, measure_frontier
from sparse_prefill.evaluation.run_times import layers_of
from sparse_prefill.evaluation.settings import CLOSE, nearest_steps, needed
from sparse_prefill.models.eval_model import load
from sparse_prefill.report import figures_of

TOKENS, BLOCK = 300, 16
TABLES = ("duo_attention", "lserve")  # need a head table, which says which heads stream
NAMES = [name for name in sp.list_strategies() if name not in ("dense", *TABLES)]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return load(write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture(scope="module")
def tokens(subject):
    return torch.tensor([subject.encode("The keeper writes down the wind and 12 waves each night. " * 20)[:TOKENS]])


def strategies():
    table = {"table": [[0.1, 0.9], [0.8, 0.2]], "sink": 16, "local": 32}
    more = {
        "triangle_mix": {"below": {"name": "local", "local": 64, "block_size": BLOCK}, "start": 1},
        **dict.fromkeys(TABLES, table),
    }
    return {name: sp.get_strategy(name, block_size=BLOCK, last=0, **more.get(name, {})) for name in (*NAMES, *TABLES)}


def at(folder):
    return Results(folder / "frontier.json", {"tokens": TOKENS}, {"command": "test"})


@pytest.fixture(scope="module")
def measured(subject, tokens, tmp_path_factory):
    results = at(tmp_path_factory.mktemp("frontier"))
    assert measure_frontier(subject, strategies(), tokens, results, query_blocks=5) == {}
    return results.content


def test_points_equal_those_of_separately_built_tables(subject, tokens, measured):
    seen = []
    subject.capture(tokens, lambda index, q, k, v, prompt: seen.append((q.clone(), k.clone())))
    layers, prompt = layers_of(subject), sp.Prompt(q_len=TOKENS, block_size=BLOCK)
    blocks = evaluation.spread_blocks(prompt.n_q, 5)
    mask, visible = reference.token_mask(prompt), prompt.visible()[0, 0]
    # Attention mass between blocks, by the formulas.
    masses = []
    for q, k in seen:
        allowed = reference.probabilities(q, k, mask)
        padded = torch.nn.functional.pad(allowed, (0, -TOKENS % BLOCK, 0, -TOKENS % BLOCK))
        by_block = padded.unflatten(3, (-1, BLOCK)).sum(-1).unflatten(2, (-1, BLOCK)).sum(3)
        masses.append((by_block / by_block.sum(-1, keepdim=True))[0])  # [heads, n_q, n_k]
    rows = measured["rows"]
    assert {row["strategy"] for row in rows} == set(strategies())
    for row in rows:
        strategy = sp.get_strategy(row["strategy"], **row["options"])
        densities, recalls = [], []
        for layer, mass, (q, k) in zip(layers, masses, seen, strict=True):
            keep = strategy.for_layer(layer).keep(q, k, prompt).expand(1, 4, -1, -1)[0]
            densities += (keep.sum((1, 2)) / visible.sum()).tolist()
            recalls += (mass * keep).sum(-1)[:, blocks].flatten().tolist()
        assert row["density"] == pytest.approx(sum(densities) / len(densities), abs=1e-5), row["name"]
        assert row["recall"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-5), row["name"]
        assert row["worst_recall"] == pytest.approx(min(recalls), abs=1e-5), row["name"]
        assert row["oracle_gap"] >= 1 - 1e-5
        assert 0 < row["overlap"] <= 1


def test_settings_are_spread_over_density_and_the_strategy_as_given_comes_last(measured):
    for name, strategy in strategies().items():
        rows = [row for row in measured["rows"] if row["strategy"] == name]
        assert rows[-1]["name"] == name
        settings = rows[:-1]
        assert bool(settings) == (strategy.tunable_option() is not None)
        found = [row["density"] for row in settings]
        assert found == sorted(found)
        for row in settings:
            value = row["options"].get(
                strategy.tunable_option().option, getattr(strategy, strategy.tunable_option().option)
            )
            assert f"{strategy.tunable_option().option}={value}" in row["name"].removeprefix(f"{name}:").split(",")
    for near in DENSITIES[2:]:  # the least density of a short prompt is higher than the first two
        random_densities = [row["density"] for row in measured["rows"] if row["strategy"] == "random"]
        assert (
            min(abs(density - near) for density in random_densities) <= CLOSE + 0.01
        )  # densities of its tables are coarse


def test_no_point_is_above_the_limit(measured):
    limit = dict(zip(measured["oracle"]["recall"], measured["oracle"]["density"], strict=True))
    assert list(limit.values()) == sorted(limit.values())
    for row in measured["rows"]:
        taken = row["oracle_gap"] * row["oracle_density"]  # density in the query blocks of the recall
        reached = max((density for share, density in limit.items() if share <= row["recall"]), default=0)
        assert taken >= reached - 1e-5, row["name"]


def test_the_figure_joins_the_settings_of_a_strategy_with_a_line(measured):
    (picture,) = figures_of(measured | {"model": "tiny"})
    axes = picture.figure.axes[0]
    assert axes.get_title() == "tiny, 300 tokens"
    lines = {line.get_label(): line for line in axes.lines}
    rows = [row for row in measured["rows"] if row["strategy"] == "flex_prefill"]
    assert sorted(lines["flex_prefill"].get_xdata()) == sorted(row["density"] for row in rows)
    assert list(axes.lines[0].get_xdata()) == measured["oracle"]["density"]


def test_a_second_run_measures_the_missing_points_in_one_dense_run(subject, tokens, measured, tmp_path, monkeypatch):
    results, runs, prefill = at(tmp_path), [], subject.prefill
    monkeypatch.setattr(subject, "prefill", lambda *args: (runs.append(args), prefill(*args)))
    two = {name: one for name, one in strategies().items() if name in ("mean_pool", "a_shape")}
    put = results.put

    def interrupted(name, values):
        put(name, values)
        if name.startswith("mean_pool:"):
            raise KeyboardInterrupt

    monkeypatch.setattr(results, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_frontier(subject, two, tokens, results, query_blocks=5)
    steps = []
    again, more = at(tmp_path), two | {"moba": strategies()["moba"]}
    measure_frontier(subject, more, tokens, again, query_blocks=5, on_step=lambda *step: steps.append(step))
    assert [text for _, _, text in steps] == ["layer 0", "layer 1", "mean_pool", "moba"]
    assert len(runs) == 2
    assert measure_frontier(subject, more, tokens, again, query_blocks=5) == {}
    assert len(runs) == 2
    names = [row["name"] for row in again.content["rows"]]
    assert len(names) == len(set(names))
    known = {row["name"]: row for row in measured["rows"]}
    assert again.content["rows"] == [known[name] for name in names]
    assert at(tmp_path).content == again.content


def test_only_every_nth_layer_is_measured_and_failures_are_reported(subject, tokens, tmp_path):
    results = at(tmp_path)
    failing = replace(strategies()["minference"], heads={9: ("vertical_and_slash", 10, 10)})
    wanted = {"broken": failing, "duo": sp.get_strategy("duo_attention"), "random": strategies()["random"]}
    failures = measure_frontier(subject, wanted, tokens, results, every=2, densities=[0.5], query_blocks=5)
    assert set(failures) == {"broken", "duo"}
    assert "head 9" in failures["broken"]
    assert "table" in failures["duo"]
    near, own = results.content["rows"]
    assert results.content["oracle"].keys() == {"recall", "density"}
    assert near["density"] == pytest.approx(0.5, abs=0.02)
    assert (own["name"], own["options"]) == ("random", {"block_size": BLOCK})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every": 0}, "every"), ({"query_blocks": 0}, "query_blocks"), ({"densities": [1.5]}, "densities")],
)
def test_options_out_of_range_are_refused(subject, tokens, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        measure_frontier(subject, strategies(), tokens, at(tmp_path), **options)


def test_a_text_of_one_block_is_refused(subject, tokens, tmp_path):
    with pytest.raises(ValueError, match="one block"):
        measure_frontier(subject, strategies(), tokens[:, :BLOCK], at(tmp_path))


def test_nearest_steps_are_close_to_the_targets():
    tried = []

    def rising(step):
        tried.append(step)
        return step / 1000

    found = nearest_steps(rising, 1001, (0.05, 0.4, 0.9))
    assert [abs(step / 1000 - x) <= CLOSE for step, x in zip(found, (0.05, 0.4, 0.9), strict=True)] == [True] * 3
    assert len(tried) == len(set(tried)) < 30
    floor = nearest_steps(lambda step: max(0.295, step / 1000), 1001, (0.05, 0.1, 0.3, 0.6))
    assert len(floor) == 2
    assert floor[0] == 0, "all targets below the floor share one setting"
    assert nearest_steps(lambda step: float(step), 3, (0.4, 5.0)) == [0, 2]
    assert nearest_steps(lambda step: 0.5, 1, (0.1, 0.9)) == [0]


def test_the_density_for_a_recall_is_interpolated_between_two_settings():
    points = [
        {"density": 0.4, "recall": 0.95, "oracle_gap": 1.2},
        {"density": 0.2, "recall": 0.85, "oracle_gap": 1.6},
        {"density": 0.1, "recall": 0.7, "oracle_gap": 2.0},
    ]
    found = needed(points, 0.9)
    assert found == pytest.approx({"target": 0.9, "recall": 0.9, "density": 0.3, "oracle_gap": 1.4})
    assert needed(points, 0.5) == {"target": 0.5, "recall": 0.7, "density": 0.1, "oracle_gap": 2.0}
    assert needed(points, 0.96) == {}
    assert math.isclose(needed(points, 0.95)["density"], 0.4)


def test_plans_and_models_with_nan_are_refused(subject, tokens, tmp_path):
    with pytest.raises(ValueError, match="p is a Plan"):
        measure_frontier(subject, {"p": sp.Plan()}, tokens, at(tmp_path))
    weight = subject.model.tok_embeddings.weight
    before = weight.detach().clone()
    weight.data[:] = float("nan")
    try:
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            measure_frontier(subject, {"pool": strategies()["mean_pool"]}, tokens, at(tmp_path))
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            calibrate(subject, replace(strategies()["mean_pool"], min_length=0), [tokens], recall=0.9)
    finally:
        weight.data.copy_(before)

"""Calibration: targets are met with the lowest density or named if out of reach, and models run saved plans."""

from __future__ import annotations

import pytest
import reference
import torch
from omegaconf import OmegaConf
from torchtune import config

import sparse_prefill as sp
from sparse_prefill.calibration import Curves, as_plan, calibrate, measure, verify
from sparse_prefill.models.eval_model import EvalModel, load
from tests.calibration.replay import Replay
from tests.tiny_gguf import HEADS, KV_HEADS, LAYERS, write_gguf
from tests.tiny_hf import write_folder

TEXTS = [torch.randint(0, 250, (400,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
SMALL = {"block_size": 16, "min_length": 0}
SETTINGS = [
    ("flex_prefill", {"min_budget": 16}),
    ("xattention", {}),
    ("flash_prefill", {"sink": 16, "local": 16, "last": 0}),
    ("prism", {}),
    ("proxy_attn", {"min_budget": 1}),
    ("minference", {"sink": 1, "local": 1}),
    ("moba", {}),
]


def small(name: str, **options) -> sp.Strategy:
    return sp.get_strategy(name, **SMALL, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def subject(folder) -> EvalModel:
    return load(write_gguf(folder / "tiny.gguf"))


@pytest.fixture(scope="module")
def captured(subject) -> Replay:
    """The tensors of a model's dense run, so that the inputs of layers equal those of calibration."""
    texts = []
    for tokens in (TEXTS[0], TEXTS[1][:330]):
        layers = []
        subject.capture(tokens[None], lambda _, q, k, v, prompt, layers=layers: layers.append((q, k, v)))
        texts.append(layers)
    return Replay(*texts)


@pytest.mark.parametrize(("name", "options"), SETTINGS)
def test_a_recall_is_met_on_the_calibration_text_with_the_lowest_setting(captured, name, options):
    strategy = small(name, **options)
    curves = measure(captured, strategy, captured.ids)
    found = curves.at_recall(0.8)
    for curve, group in zip(curves.curves, found.groups, strict=True):
        assert group.recall >= 0.8
        step = next(s for s in range(curve.steps) if curve.value(s) == group.value)
        assert step == 0 or curve.recall(step - 1) < 0.8
    served = verify(captured, found.plan, captured.ids)
    assert served.recall == pytest.approx(found.recall, abs=1e-5)
    assert served.density == pytest.approx(found.density, abs=1e-5)
    for group in found.groups:
        heads = list(group.heads)
        assert float(served.recalls[:, group.layer, heads].mean()) == pytest.approx(group.recall, abs=1e-5)
    assert found.density < 0.95


def test_recall_equals_that_of_the_naive_probabilities(captured):
    found = calibrate(captured, small("mean_pool"), captured.ids[:1], recall=0.7, query_blocks=1000)
    for index, (q, k, _) in enumerate(captured.texts[400]):
        prompt = sp.Prompt(q_len=400, block_size=16)
        strategy = found.plan.for_layer(sp.Layer(index, LAYERS))
        kept = strategy.keep(q, k, prompt).repeat_interleave(16, 2).repeat_interleave(16, 3)
        probability = reference.probabilities(q, k, reference.token_mask(prompt)[:, None])
        by_row = (probability * kept[:, :, :400, :400]).sum(-1)[0]  # [Hq, 400], a whole number of blocks
        for group in found.groups:
            if group.layer == index:
                assert group.recall == pytest.approx(float(by_row[list(group.heads)].mean()), abs=1e-4)


def test_a_density_target_gives_the_highest_common_recall_within_it(captured):
    curves = measure(captured, small("xattention"), captured.ids)
    found = curves.at_density(0.5)
    assert 0.45 < found.density <= 0.5
    level = min(group.recall for group in found.groups)
    assert curves.at_recall(level).density <= 0.5
    assert curves.at_recall(min(1, level + 0.01)).density > 0.5
    assert calibrate(captured, small("xattention"), captured.ids, density=0.5) == found
    with pytest.raises(ValueError, match=r"can't go down to a density of 0.05: with the least threshold"):
        curves.at_density(0.05)


def test_targets_out_of_reach_are_named(captured):
    strategy = small("flex_prefill", min_budget=16, max_budget=32)
    with pytest.raises(
        ValueError, match=r"flex_prefill can't reach a recall of 0.99 by its gamma in layer 0 heads 0-1"
    ):
        calibrate(captured, strategy, captured.ids, recall=0.99)


@pytest.mark.parametrize(("by", "count"), [("layer", 1), ("group", KV_HEADS), ("head", HEADS)])
def test_layers_groups_and_heads_have_separate_values(captured, by, count):
    found = calibrate(captured, small("mean_pool"), captured.ids, recall=0.8, by=by)
    assert len(found.groups) == LAYERS * count
    assert sorted(h for g in found.groups if g.layer == 1 for h in g.heads) == list(range(HEADS))
    served = verify(captured, found.plan, captured.ids)
    assert served.recall == pytest.approx(found.recall, abs=1e-5)


def test_values_by_head_need_no_more_density_than_values_by_layer_at_equal_recall(captured):
    density = {
        by: calibrate(captured, small("oracle"), captured.ids, recall=0.8, by=by).density for by in ("head", "layer")
    }
    assert density["head"] < density["layer"] + 0.02


def test_a_plan_is_written_in_its_shortest_form():
    flash, x = small("flash_prefill"), small("xattention")
    same = as_plan(flash, {(0, (0, 1)): 0.1, (0, (2, 3)): 0.1, (1, (0, 1)): 0.1, (1, (2, 3)): 0.2})
    assert same.layers[0] == small("flash_prefill", alpha=0.1)
    assert same.layers[1].name == "by_head"
    assert as_plan(x, {(0, (0, 1)): 0.5, (0, (2, 3)): 0.75}).layers[0].threshold == (0.5, 0.5, 0.75, 0.75)
    assert as_plan(x, {(0, (0, 1)): 0.5, (0, (2, 3)): 0.5}).layers[0].threshold == 0.5


@pytest.mark.parametrize("source", ["gguf", "folder"])
@pytest.mark.parametrize("name", ["flash_prefill", "xattention"])
def test_a_saved_plan_runs_in_models_of_both_formats(folder, tmp_path, source, name):
    subject = load(write_gguf(folder / "tiny.gguf") if source == "gguf" else write_folder(folder))
    found = calibrate(subject, small(name, **dict(SETTINGS)[name]), TEXTS, recall=0.8)
    found.plan.save(tmp_path / "plan.yaml")
    plan = sp.Plan.load(tmp_path / "plan.yaml")
    assert plan == found.plan
    recipe = OmegaConf.create({"_component_": "sparse_prefill.Plan.load", "path": str(tmp_path / "plan.yaml")})
    assert config.instantiate(recipe) == plan
    served = verify(subject, plan, TEXTS)
    assert served.recalls.shape == (2, LAYERS, HEADS)
    assert served.recall == pytest.approx(found.recall, abs=0.05)  # inputs of upper layers come from sparse ones
    assert 0.1 < served.density < 0.9


def test_two_calibrations_give_the_same_result(subject):
    once, again = (calibrate(subject, small("flex_prefill"), TEXTS, recall=0.9) for _ in range(2))
    assert once == again


def test_strategies_are_calibrated_with_the_rotary_embedding_of_their_layer(subject):
    """Without its layer, prism assumes a rotary layout other than this model's."""
    found = calibrate(subject, small("prism"), TEXTS[:1], recall=0.8)
    assert verify(subject, found.plan, TEXTS[:1]).recalls[:, 0].mean() == pytest.approx(
        sum(g.recall for g in found.groups if g.layer == 0) / KV_HEADS, abs=1e-4
    )


def test_progress_counts_the_layers_of_all_texts(subject):
    seen = []
    calibrate(subject, small("mean_pool"), TEXTS, recall=0.8, on_progress=lambda *done: seen.append(done))
    assert seen == [(i, 2 * LAYERS) for i in range(1, 2 * LAYERS + 1)]


def test_layers_that_a_plan_leaves_dense_have_recall_and_density_one(subject):
    plan = sp.Plan(default=small("a_shape", sink=16, local=16), layers={0: "dense"})
    served = verify(subject, plan, TEXTS[:1])
    assert (served.recalls[0, 0] == 1).all()
    assert (served.densities[0, 0] == 1).all()
    assert served.densities[0, 1].max() < 0.25


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"recall": None}, "Give one target"),
        ({"density": 0.5}, "Give one target"),
        ({"recall": 1.5}, r"recall must be a number in \(0, 1\]"),
        ({"recall": None, "density": 0}, r"density must be a number in \(0, 1\]"),
        ({"texts": []}, "texts must be one or more"),
        ({"texts": [[1.5, 2.5]]}, "texts must be one or more"),
        ({"texts": [[1] * 200]}, r"flex_prefill runs text 0 of 200 tokens dense \(min_length\)"),
        ({"by": "row"}, "by must be one of layer, group, head"),
        ({"strategy": "proxy_attn", "by": "head"}, "scores the heads of a layer together"),
        ({"strategy": "dense"}, "dense with these options has no tunable option"),
        ({"strategy": "no_such"}, "Unknown strategy"),
        ({"query_blocks": 0}, "query_blocks"),
    ],
)
def test_wrong_input_is_refused(subject, change, match):
    settings = {"strategy": "flex_prefill", "texts": TEXTS, "recall": 0.9, **change}
    strategy, texts = settings.pop("strategy"), settings.pop("texts")
    with pytest.raises(ValueError, match=match):
        calibrate(subject, strategy, texts, **settings)


def test_verifying_a_text_that_runs_dense_is_refused(subject):
    with pytest.raises(ValueError, match=r"200 tokens ran dense \(min_length\)"):
        verify(subject, "flex_prefill", [[1] * 200])


def test_curves_serve_several_targets(captured):
    curves = measure(captured, small("flash_prefill", sink=0, local=0, last=0), captured.ids)
    assert isinstance(curves, Curves)
    densities = [curves.at_recall(target).density for target in (0.5, 0.7, 0.9)]
    assert densities == sorted(densities)
    recall, density = curves.curves[0].measure(1e-12)
    assert (recall, density) == (pytest.approx(1), 1)

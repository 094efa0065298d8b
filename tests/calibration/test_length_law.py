"""The law of thresholds over length."""

from __future__ import annotations

import math

import pytest
import reference
import torch

import sparse_prefill as sp
from sparse_prefill.calibration import LengthLaw, fit_length_law, length_error, measure
from sparse_prefill.calibration.length_law import _fit
from tests.calibration.replay import Replay

FLASH = sp.get_strategy("flash_prefill", block_size=16, min_length=0, sink=0, local=0, last=0)
LENGTHS = (160, 240, 320)


@pytest.fixture(scope="module")
def subject() -> Replay:
    """Two layers of six heads, cut to several lengths."""
    layers = [reference.random_qkv(q_len=480, seed=seed, scale=3) for seed in (1, 2)]
    return Replay(*([tuple(x[:, :, :n] for x in qkv) for qkv in layers] for n in (*LENGTHS, 480)))


@pytest.fixture(scope="module")
def law(subject) -> LengthLaw:
    return fit_length_law(subject, FLASH, [[0] * 480], lengths=LENGTHS, recalls=(0.6, 0.7, 0.8))


def test_an_exact_law_is_recovered():
    a, b = {(0, (0, 1)): 900.0, (0, (2, 3)): 30.0}, -9.0
    points = {p: [(t, math.log(f) + b * t) for t in (0.8, 0.9) for _ in range(3)] for p, f in a.items()}
    points[0, (2, 3)].pop()  # groups may have different numbers of points
    found, slope = _fit({**points, (1, (0, 1)): []})
    assert slope == pytest.approx(b)
    assert found[0, (0, 1)] == pytest.approx(900)
    assert found[0, (2, 3)] == pytest.approx(30)
    assert found[1, (0, 1)] == pytest.approx((900 * 30) ** 0.5)  # without points: the geometric mean
    with pytest.raises(ValueError, match="guards reach the recalls without one"):
        _fit({(0, (0,)): [(0.9, 1.0)], (1, (0,)): []})


def test_the_fit_is_the_least_squares_solution_over_calibrated_values(subject, law):
    places, rows, wanted = list(law.a), [], []
    for length in LENGTHS:
        curves = measure(subject, FLASH, [[0] * length])
        for recall in law.recalls:
            for group in curves.at_recall(recall).groups:
                if group.value != 1:
                    row = [0.0] * (len(places) + 1)
                    row[places.index((group.layer, group.heads))], row[-1] = 1.0, recall
                    rows.append(row)
                    wanted.append(math.log(group.value * length))
    expected = torch.linalg.lstsq(torch.tensor(rows).double(), torch.tensor(wanted).double()[:, None]).solution[:, 0]
    assert law.b == pytest.approx(float(expected[-1]), rel=1e-4)
    assert [math.log(law.a[place]) for place in places] == pytest.approx(expected[:-1].tolist(), rel=1e-4)


def test_thresholds_follow_the_law_within_their_range(law):
    values = law.values(0.75, 1000)
    for place, a in law.a.items():
        assert values[place] == pytest.approx(min(1.0, a * math.exp(law.b * 0.75) / 1000), rel=1e-5)
    assert set(law.values(0.01, 1).values()) == {1.0}
    plan = law.plan(0.75, 1000)
    bound = plan.for_layer(sp.Layer(1, 2))
    assert bound.heads.get(5, bound.of).alpha == values[1, (3, 4, 5)]


def test_the_error_compares_the_thresholds_of_the_law_with_calibrated_ones(subject, law):
    (found,) = length_error(subject, law, [[0] * 480], recalls=[0.75])
    curves = measure(subject, FLASH, [[0] * 480])
    predicted, calibrated = law.values(0.75, 480), curves.at_recall(0.75)
    measured = [curve.measure(predicted[curve.layer, curve.heads]) for curve in curves.curves]
    assert (found.tokens, found.target) == (480, 0.75)
    assert found.recall == pytest.approx(sum(r for r, _ in measured) / 4)
    assert found.density == pytest.approx(sum(d for _, d in measured) / 4)
    assert (found.calibrated_recall, found.calibrated_density) == (calibrated.recall, calibrated.density)
    ratios = [abs(math.log(g.value / predicted[g.layer, g.heads])) for g in calibrated.groups]
    assert found.log_ratio == pytest.approx(sum(ratios) / 4)


def test_a_saved_law_is_loaded_unchanged(law, tmp_path):
    law.save(tmp_path / "law.yaml")
    assert LengthLaw.load(tmp_path / "law.yaml") == law
    (tmp_path / "plan.yaml").write_text("default: dense\n")
    with pytest.raises(ValueError, match="isn't a length law"):
        LengthLaw.load(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("strategy", "change", "match"),
    [
        (
            "flex_prefill",
            {},
            "gamma isn't one. Strategies with a threshold: flash_prefill, mean_slash, seer_attention",
        ),
        ("dense", {}, "no tunable option"),
        (FLASH, {"recalls": [0.9]}, "at least two recalls"),
        (FLASH, {"recalls": [0.9, 2]}, r"recalls must be a number in \(0, 1\]"),
        (FLASH, {"lengths": []}, "a length to fit to"),
        (FLASH, {"lengths": [160, 640]}, "at least 640 tokens, the longest of the lengths, got 480"),
    ],
)
def test_wrong_input_is_refused(subject, strategy, change, match):
    with pytest.raises(ValueError, match=match):
        fit_length_law(subject, strategy, [[0] * 480], **{"lengths": LENGTHS, **change})


def test_texts_of_different_lengths_are_refused(subject, law):
    with pytest.raises(ValueError, match=r"of one length, got \[320, 480\]"):
        length_error(subject, law, [[0] * 480, [0] * 320])

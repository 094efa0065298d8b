"""Growth with length of the time that methods need for a recall, interpolated between their settings."""

from __future__ import annotations

import pytest

from sparse_prefill.evaluation.growth import growth_at_recalls


def case(tokens, factor):
    rows = [
        {"name": "flex_prefill:gamma=0.8", "recall": 0.84, "total": 0.1 * factor, "oracle density": 0.1},
        {"name": "flex_prefill:gamma=0.9", "recall": 0.94, "total": 0.2 * factor, "oracle density": 0.2},
        {"name": "prism:share=0.9", "recall": 0.88, "total": 0.5 * factor, "oracle density": 0.14},
        {"name": "prism", "recall": 0.96, "total": 0.1 * factor, "oracle density": 0.22},
    ]
    return {"tokens": tokens, "dense flex": 0.5 * factor**2, "strategies": rows}


def test_times_are_interpolated_between_settings_and_the_fastest_method_counts():
    low, high = growth_at_recalls(case(4096, 1), case(16384, 4), [0.85, 0.95])
    assert low["recall"] == 0.85
    assert low["fastest"] == ["flex_prefill", "flex_prefill"]
    assert low["seconds"] == pytest.approx([0.11, 0.44])
    assert low["power"] == pytest.approx(1)
    assert low["oracle power"] == pytest.approx(2)
    assert low["powers"] == {"flex_prefill": pytest.approx(1), "prism": None}
    assert high["fastest"] == ["prism", "prism"]
    assert high["powers"] == {"flex_prefill": None, "prism": pytest.approx(1)}


def test_recalls_outside_the_measured_range_are_left_out():
    assert growth_at_recalls(case(4096, 1), case(16384, 4), [0.5, 0.99]) == []
    short = case(4096, 1)
    short["strategies"] = short["strategies"][2:]
    assert growth_at_recalls(short, case(16384, 4), [0.85]) == []


def test_two_profiles_of_one_length_are_refused():
    with pytest.raises(ValueError, match="got 4096 tokens twice"):
        growth_at_recalls(case(4096, 1), case(4096, 1))

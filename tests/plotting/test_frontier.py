"""The frontier holds every point and the limit."""

import pytest

from sparse_prefill import plotting

POINTS = {"one": [(0.4, 0.95), (0.2, 0.8)], "other": [(0.3, 0.85)], "none": []}


def test_points_of_a_strategy_are_joined_in_the_order_of_density():
    axes = plotting.frontier(POINTS).axes[0]
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert drawn == {"other": [(0.3, 0.85)], "one": [(0.2, 0.8), (0.4, 0.95)]}
    assert axes.get_xlabel().startswith("density")
    assert axes.get_ylabel().startswith("recall")
    low, high = axes.get_ylim()
    assert low < 0.8
    assert high > 1


def test_the_oracle_is_a_limit_that_never_falls():
    figure = plotting.frontier(POINTS, oracle=[(0.3, 0.97), (0.1, 0.7), (0.2, 0.9), (0.25, 0.89)])
    limit = figure.axes[0].lines[0]
    assert limit.get_linestyle() == "--"
    assert list(limit.get_xdata()) == [0.1, 0.2, 0.25, 0.3]
    assert list(limit.get_ydata()) == [0.7, 0.9, 0.9, 0.97]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["oracle", "other", "one"]


def test_strategies_have_different_colours_or_markers():
    many = {f"s{i}": [(i / 40, i / 40)] for i in range(40)}
    looks = {(line.get_color(), line.get_marker()) for line in plotting.frontier(many).axes[0].lines}
    assert len(looks) == 40


def test_impossible_points_are_refused():
    with pytest.raises(ValueError, match="at least one strategy"):
        plotting.frontier({"none": []})
    for wrong in ((1.2, 0.5), (0.5, float("nan"))):
        with pytest.raises(ValueError, match=r"lie in \[0, 1\], got .* of one"):
            plotting.frontier({"one": [wrong]})
    with pytest.raises(ValueError, match="of oracle"):
        plotting.frontier(POINTS, oracle=[(0.5, -0.1)])

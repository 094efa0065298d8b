"""The length from which speed-ups exceed 1, and its mark in the figure."""

import pytest

from sparse_prefill import plotting

LENGTHS = [1024, 2048, 4096, 8192]


@pytest.mark.parametrize(
    ("speedups", "passes"),
    [
        ([0.5, 0.75, 1.25, 2], 2048 * 2**0.5),  # halfway from 0.75 to 1.25
        ([0.5, 1, 1.5, 2], 2048),
        ([1.5, 0.5, 1.5, 2], 2048 * 2**0.5),  # the last crossing counts
        ([1, 1.5, 1.5, 2], 1024),
        ([1.5, 1.5, 1.5, 0.9], None),
        ([0.1, 0.2, 0.3, 0.4], None),
    ],
)
def test_crossover_is_where_the_speedup_passes_one_for_the_last_time(speedups, passes):
    found = plotting.crossover(LENGTHS, speedups)
    assert found == (passes if passes is None else pytest.approx(passes))


def test_the_figure_has_every_line_and_marks_the_crossover():
    speedups = {"sparse": [0.5, 0.75, 1.25, 2], "slow": [0.1, 0.2, 0.3, 0.4], "fast": [1.5, 2, 3, 4]}
    figure = plotting.speedup(LENGTHS, speedups)
    axes = figure.axes[0]
    lines = {line.get_label().split(" ")[0]: line for line in axes.lines}
    for name, ratios in speedups.items():
        assert list(lines[name].get_xdata()) == LENGTHS
        assert list(lines[name].get_ydata()) == ratios
    marks = [line for line in axes.lines if line.get_marker() == "|"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [(pytest.approx(2896, abs=1), 1)]
    assert marks[0].get_color() == lines["sparse"].get_color()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["sparse (from 2,896 tokens)", "slow (slower)", "fast (always)"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1,024", "2,048", "4,096", "8,192"]


def test_invalid_lengths_and_speedups_are_refused():
    with pytest.raises(ValueError, match="at least one strategy"):
        plotting.speedup(LENGTHS, {})
    for lengths in ([], [2, 1, 3, 4], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="lengths must be ascending"):
            plotting.crossover(lengths, [1, 1, 1, 1])
    for wrong in ([1, 1, 1], [1, 1, 1, None], [1, 1, 1, 0], [1, 1, 1, float("nan")]):
        with pytest.raises(ValueError, match="one must be 4 positive numbers"):
            plotting.speedup(LENGTHS, {"one": wrong})

"""A grid of needles has a cell for each length and depth, labelled with its score."""

import pytest
import torch

from sparse_prefill import plotting


def test_each_cell_shows_its_score_at_its_length_and_depth():
    scores = torch.tensor([[1, 0.5, 0], [0.25, torch.nan, 1]])
    axes = plotting.needle_grid(scores, [0, 0.5], [4096, 8192, 16384], "flex_prefill").axes[0]
    shown = torch.as_tensor(axes.images[0].get_array().filled(torch.nan))
    assert torch.equal(shown.isnan(), scores.isnan())
    assert torch.equal(shown.nan_to_num(), scores.nan_to_num())
    texts = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "1.00", (0, 1): "0.50", (0, 2): "0.00", (1, 0): "0.25", (1, 2): "1.00"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4,096", "8,192", "16,384"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "50%"]
    assert axes.get_title() == "flex_prefill\nmean 0.55"
    bottom, top = axes.get_ylim()
    assert bottom > top, "the beginning of the prompt is at the top"


def test_grids_of_the_wrong_shape_or_range_are_refused():
    with pytest.raises(ValueError, match=r"\[depths, lengths\] = \[2, 1\]"):
        plotting.needle_grid(torch.zeros(1, 2), [0, 1], [4096])
    with pytest.raises(ValueError, match="at least one cell"):
        plotting.needle_grid(torch.zeros(0, 0), [], [])
    with pytest.raises(ValueError, match=r"shares in \[0, 1\]"):
        plotting.needle_grid(torch.tensor([[2.0]]), [0], [4096])

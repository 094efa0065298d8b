"""Maps of layers and heads show the numbers that they were given."""

import pytest
import torch

from sparse_prefill import plotting


def test_density_map_shows_every_layer_and_head():
    densities = torch.rand(5, 3)
    figure = plotting.density_map(densities, "Densities")
    image = figure.axes[0].images[0]
    torch.testing.assert_close(torch.as_tensor(image.get_array()), densities)
    assert f"mean {densities.mean():.2f}" in figure.axes[0].get_title()


def test_head_map_shows_three_panels_and_their_numbers(tmp_path):
    visible = torch.ones(8, 8, dtype=torch.bool).tril()
    mass = torch.rand(8, 8).masked_fill(~visible, 0)
    mass = mass / mass.sum(-1, keepdim=True)
    keep = torch.eye(8, dtype=torch.bool)
    figure = plotting.head_map(torch.rand(8, 8), keep, mass, "A head")
    titles = [axes.get_title() for axes in figure.axes]
    recall = float(mass.diagonal().sum() / mass.sum())
    assert titles == ["scores", "kept blocks: density 0.22", f"true attention: {recall:.0%} of it kept"]
    kept = torch.as_tensor(figure.axes[1].images[0].get_array().filled(float("nan")))
    assert torch.equal(kept.nan_to_num(0).bool(), keep)
    assert bool(kept.isnan()[~visible].all())
    figure.savefig(tmp_path / "head.png")
    assert (tmp_path / "head.png").stat().st_size > 1000


def test_recall_map_shows_every_layer_and_head_at_whole_numbers():
    recalls = torch.rand(3, 9)
    figure = plotting.recall_map(recalls)
    torch.testing.assert_close(torch.as_tensor(figure.axes[0].images[0].get_array()), recalls)
    assert figure.axes[0].images[0].get_clim() == (0, 1)
    assert figure.axes[0].get_title() == f"Recall by layer and head\nmean {recalls.mean():.2f}"
    assert all(tick % 1 == 0 for tick in figure.axes[0].get_yticks())


@pytest.mark.parametrize("draw", [plotting.density_map, plotting.recall_map])
def test_maps_of_the_wrong_shape_or_range_are_refused(draw):
    with pytest.raises(ValueError, match=r"\[layers, heads\], got \[3\]"):
        draw(torch.rand(3))
    for wrong in (torch.tensor([[1.1]]), torch.tensor([[float("nan")]])):
        with pytest.raises(ValueError, match=r"shares in \[0, 1\]"):
            draw(wrong)


def test_tables_of_a_head_must_have_the_same_shape():
    with pytest.raises(ValueError, match=r"got \[8, 8\], \[8, 8\], \[8, 9\]"):
        plotting.head_map(torch.rand(8, 8), torch.eye(8).bool(), torch.rand(8, 9))

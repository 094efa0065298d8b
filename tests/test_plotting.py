"""Figures hold what they were given."""

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

"""Pictures of what a strategy did, as matplotlib figures. Needs the ``plot`` extra."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor


def density_map(densities: Tensor, title: str = "Density by layer and head") -> Figure:
    """Share of the blocks that each head computed.

    Args:
        densities (Tensor): [layers, heads], in [0, 1].
        title (str): title of the figure.

    Returns:
        Figure: the picture.
    """
    layers, heads = densities.shape
    figure = Figure(figsize=(1.8 + 0.32 * heads, 1.4 + 0.2 * layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(densities.cpu().numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="head", ylabel="layer", title=f"{title}\nmean {densities.mean():.2f}")
    figure.colorbar(image, label="kept blocks / visible blocks")
    return figure


def head_map(scores: Tensor, keep: Tensor, mass: Tensor, title: str = "One head") -> Figure:
    """What an estimator scored, what was kept of it, and where the attention truly is.

    Args:
        scores (Tensor): estimated importance, fp32 [n_q, n_k].
        keep (Tensor): kept blocks, bool [n_q, n_k].
        mass (Tensor): true attention mass, fp32 [n_q, n_k], rows summing to 1.
        title (str): title of the figure.

    Returns:
        Figure: three panels over one block grid; colours of scores and mass are logarithmic.
    """
    visible = torch.ones_like(keep).tril(keep.shape[1] - keep.shape[0])
    recall = float((mass * keep).sum() / mass.sum())
    density = float((keep & visible).sum() / visible.sum())
    figure = Figure(figsize=(13, 5), layout="compressed")
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, image, name in (
        (panels[0], _log(scores, visible), "scores"),
        (panels[1], keep.float().masked_fill(~visible, torch.nan), f"kept blocks: density {density:.2f}"),
        (panels[2], _log(mass, visible), f"true attention: {recall:.0%} of it kept"),
    ):
        axes.imshow(image.cpu().numpy(), cmap="magma", interpolation="nearest")
        axes.set(title=name, xlabel="key block")
    panels[0].set_ylabel("query block")
    return figure


def _log(x: Tensor, visible: Tensor) -> Tensor:
    """Base-10 logarithm over four decades, blank where nothing is visible."""
    top = x.max().clamp(min=torch.finfo(torch.float32).tiny)
    return (x / top).clamp(min=1e-4).log10().masked_fill(~visible, torch.nan)

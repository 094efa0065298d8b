"""Maps of layers and heads, and of one head block by block."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor


def density_map(densities: Tensor, title: str = "Density by layer and head") -> Figure:
    """Density of each head.

    Args:
        densities (Tensor): [layers, heads], in [0, 1].
        title (str): title of the figure.

    Returns:
        Figure: the picture.

    Raises:
        ValueError: if the numbers have another shape or range.
    """
    return _by_head(densities, title, "kept blocks / visible blocks", "viridis")


def recall_map(recalls: Tensor, title: str = "Recall by layer and head") -> Figure:
    """Recall of each head.

    Args:
        recalls (Tensor): [layers, heads], in [0, 1].
        title (str): title of the figure.

    Returns:
        Figure: the picture.

    Raises:
        ValueError: if the numbers have another shape or range.
    """
    return _by_head(recalls, title, "kept attention", "magma")


def head_map(scores: Tensor, keep: Tensor, mass: Tensor, title: str = "One head") -> Figure:
    """Scores, kept blocks and true attention of one head.

    Args:
        scores (Tensor): estimated importance, fp32 [n_q, n_k].
        keep (Tensor): kept blocks, bool [n_q, n_k].
        mass (Tensor): true attention mass, fp32 [n_q, n_k], rows summing to 1.
        title (str): title of the figure.

    Returns:
        Figure: three panels over one block grid; colours of scores and mass are logarithmic.

    Raises:
        ValueError: if the shapes of the tables differ.
    """
    if keep.ndim != 2 or scores.shape != keep.shape or mass.shape != keep.shape:
        shapes = ", ".join(str(list(table.shape)) for table in (scores, keep, mass))
        raise ValueError(f"The three tables of a head are [n_q, n_k] each, got {shapes}.")
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


def _by_head(values: Tensor, title: str, label: str, colours: str) -> Figure:
    if values.ndim != 2 or not values.numel():
        raise ValueError(f"A map must be [layers, heads], got {list(values.shape)}.")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("A map shows shares in [0, 1], and some are outside of that or NaN.")
    layers, heads = values.shape
    figure = Figure(figsize=(1.8 + 0.32 * heads, 1.4 + 0.2 * layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values.cpu().numpy(), vmin=0, vmax=1, cmap=colours, aspect="auto")
    axes.set(xlabel="head", ylabel="layer", title=f"{title}\nmean {values.mean():.2f}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, label=label)
    return figure


def _log(x: Tensor, visible: Tensor) -> Tensor:
    """Base-10 logarithm over four decades, blank for invisible blocks."""
    top = x.max().clamp(min=torch.finfo(torch.float32).tiny)
    return (x / top).clamp(min=1e-4).log10().masked_fill(~visible, torch.nan)

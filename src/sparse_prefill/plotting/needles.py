"""Found needles by length and depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor


def needle_grid(
    scores: Tensor, depths: Sequence[float], lengths: Sequence[int], title: str = "Needles found"
) -> Figure:
    """Scores over the length of the prompt and the depth of the needle.

    Args:
        scores (Tensor): share of the needles that are found, [depths, lengths], in [0, 1]; NaN where none was hidden.
        depths (Sequence[float]): depths of the needles, in [0, 1]; 0 is the beginning of the prompt.
        lengths (Sequence[int]): lengths of the prompts in tokens.
        title (str): title of the figure.

    Returns:
        Figure: the picture, the beginning of the prompt at the top, and the score in each cell.

    Raises:
        ValueError: if there are no cells, or the numbers have another shape or range.
    """
    if not scores.numel() or scores.shape != (len(depths), len(lengths)):
        raise ValueError(
            f"scores must be [depths, lengths] = {[len(depths), len(lengths)]} with at least one cell, got "
            f"{list(scores.shape)}."
        )
    known = scores[~scores.isnan()]
    if not bool(((known >= 0) & (known <= 1)).all()):
        raise ValueError("A needle grid shows shares in [0, 1], and some are outside of that.")
    figure = Figure(figsize=(2.2 + 0.8 * len(lengths), 1.6 + 0.4 * len(depths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(scores.cpu().numpy(), vmin=0, vmax=1, cmap="RdYlGn", alpha=0.7, aspect="auto")
    for row, column in (~scores.isnan()).nonzero().tolist():
        axes.text(column, row, f"{scores[row, column]:.2f}", ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    mean = f"mean {torch.nanmean(scores):.2f}" if known.numel() else "none hidden"
    axes.set(xlabel="tokens", ylabel="depth", title=f"{title}\n{mean}")
    figure.colorbar(image, label="share found")
    return figure

"""The highest entries of long rows, of which few are sorted: how a CPU selects for whole heads."""

from __future__ import annotations

import torch
from torch import Tensor

BIN_BITS = 20  # of a value's 31 that entries of a bin may differ in: they lie within an eighth of each other
BINS = 2 ** (31 - BIN_BITS)
AT_ONCE = 1 << 22  # entries that are cast to fp64 at once


def reaching_by_bins(mass: Tensor, share: float | Tensor, forced: Tensor | None, within: bool) -> Tensor:
    """:func:`~sparse_prefill.selectors.cumulative.cumulative` over the last two dimensions.

    Entries are summed up by bins of nearly equal values, and only the bin in which the share is met is sorted.

    Args:
        mass (Tensor): fp32 [..., m, n] on a CPU, not negative.
        share (float | Tensor): broadcastable to [..., 1, 1].
        forced (Tensor | None): bool, broadcastable to ``mass``.
        within (bool): whether the entry that crosses the share is dropped.

    Returns:
        Tensor: bool [..., m, n].
    """
    shares = torch.as_tensor(share, dtype=torch.float64).expand(*mass.shape[:-2], 1, 1).flatten().tolist()
    rows = mass.reshape(len(shares), -1)
    first = None if forced is None else forced.expand_as(mass).reshape(len(shares), -1)
    kept = torch.empty(rows.shape, dtype=torch.bool)
    for i, of_row in enumerate(shares):
        kept[i] = _of_row(rows[i], of_row, None if first is None else first[i], within)
    return kept.view(mass.shape)


def _of_row(mass: Tensor, share: float, forced: Tensor | None, within: bool) -> Tensor:
    """bool [n] of fp32 [n]."""
    if share == 1:
        return torch.ones_like(mass, dtype=torch.bool)
    target = share * float(mass.sum(dtype=torch.float64))
    if forced is not None:
        target -= float(mass[forced].sum(dtype=torch.float64))
        mass = mass.masked_fill(forced, 0)
    bins = mass.view(torch.int32) >> BIN_BITS  # the order of numbers that aren't negative is that of their bits
    reached = _sums(mass, bins).flip(0).cumsum(0).flip(0)  # of a bin and those above it
    last = max(int((reached >= target).sum()) - 1, 0)  # the highest bin with which they meet the share
    kept = bins > last
    undecided = (bins == last).nonzero()[:, 0]
    ranked, order = mass[undecided].sort(descending=True, stable=True)
    above = float(reached[last + 1]) if last + 1 < BINS else 0.0
    total = above + ranked.cumsum(0, dtype=torch.float64)
    wanted = (total <= target) if within else (total - ranked < target)
    kept[undecided[order[wanted & (ranked > 0)]]] = True
    return kept if forced is None else kept | forced


def _sums(mass: Tensor, bins: Tensor) -> Tensor:
    """Sum of the entries in each bin: fp64 [BINS]."""
    sums = torch.zeros(BINS, dtype=torch.float64)
    for i in range(0, len(mass), AT_ONCE):
        part = slice(i, i + AT_ONCE)
        sums += torch.bincount(bins[part], weights=mass[part].double(), minlength=BINS)
    return sums

"""Selection by cumulative mass over whole heads on a CPU, which sorts only a few entries."""

from __future__ import annotations

import torch
from torch import Tensor

BIN_BITS = 20  # lowest of a value's 31 bits, in which entries of a bin differ: these lie within an eighth of each other
NUM_BINS = 2 ** (31 - BIN_BITS)
MAX_CAST_ENTRIES = 1 << 22  # to fp64 at once


def reaching_by_bins(mass: Tensor, share: float | Tensor, forced: Tensor | None, within: bool) -> Tensor:
    """:func:`~sparse_prefill.selectors.cumulative.cumulative` over the last two dimensions.

    Entries are summed by bins of nearly equal values, and only the bin in which the share is reached is sorted.

    Args:
        mass (Tensor): fp32 [..., m, n] on a CPU, not negative.
        share (float | Tensor): in [0, 1], broadcastable to [..., 1, 1].
        forced (Tensor | None): bool, broadcastable to ``mass``.
        within (bool): whether the entry that crosses the share is dropped.

    Returns:
        Tensor: bool [..., m, n].
    """
    shares = torch.as_tensor(share, dtype=torch.float64).expand(*mass.shape[:-2], 1, 1).flatten().tolist()
    rows = mass.reshape(len(shares), -1)
    always = None if forced is None else forced.expand_as(mass).reshape(len(shares), -1)
    kept = torch.empty(rows.shape, dtype=torch.bool)
    for i, row_share in enumerate(shares):
        kept[i] = _row_reaching(rows[i], row_share, None if always is None else always[i], within)
    return kept.view(mass.shape)


def _row_reaching(mass: Tensor, share: float, forced: Tensor | None, within: bool) -> Tensor:
    """As :func:`reaching_by_bins`, for one row: fp32 [n] to bool [n]."""
    if share == 1:
        return torch.ones_like(mass, dtype=torch.bool)
    target = share * float(mass.sum(dtype=torch.float64))
    if forced is not None:
        target -= float(mass[forced].sum(dtype=torch.float64))
        mass = mass.masked_fill(forced, 0)
    bins = mass.view(torch.int32) >> BIN_BITS  # nonnegative floats are ordered as their bits
    reached = _sums(mass, bins).flip(0).cumsum(0).flip(0)  # of each bin and all higher ones
    last = max(int((reached >= target).sum()) - 1, 0)  # the bin in which the share is reached
    kept = bins > last
    undecided = (bins == last).nonzero()[:, 0]
    ranked, order = mass[undecided].sort(descending=True, stable=True)
    above = float(reached[last + 1]) if last + 1 < NUM_BINS else 0.0
    total = above + ranked.cumsum(0, dtype=torch.float64)
    wanted = (total <= target) if within else (total - ranked < target)
    kept[undecided[order[wanted & (ranked > 0)]]] = True
    return kept if forced is None else kept | forced


def _sums(mass: Tensor, bins: Tensor) -> Tensor:
    """Sum of the entries in each bin: fp64 [NUM_BINS]."""
    sums = torch.zeros(NUM_BINS, dtype=torch.float64)
    for i in range(0, len(mass), MAX_CAST_ENTRIES):
        part = slice(i, i + MAX_CAST_ENTRIES)
        sums += torch.bincount(bins[part], weights=mass[part].double(), minlength=NUM_BINS)
    return sums

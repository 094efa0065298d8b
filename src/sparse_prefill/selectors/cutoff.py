"""Selection by cumulative mass on a GPU, which searches the lowest value to keep instead of sorting.

A sort moves every entry many times. The search reads all entries a few times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_prefill.core.fused import compile_on_gpu

BITS_PER_PASS = 3  # of the lowest value: eleven passes over the entries, with up to seven sums each


@compile_on_gpu
def reaching(mass: Tensor, share: Tensor, forced: Tensor | None, dims: int, within: bool) -> Tensor:
    """:func:`~sparse_prefill.selectors.cumulative.cumulative` over the last one or two dimensions.

    Sums are taken in another order. So the result may differ by an entry where a sum equals the share up to rounding.

    Args:
        mass (Tensor): fp32 [..., n] or [..., m, n], not negative.
        share (Tensor): in [0, 1], broadcastable to [..., 1] or [..., 1, 1].
        forced (Tensor | None): bool, broadcastable to ``mass``.
        dims (int): number of last dimensions that form a row, 1 or 2.
        within (bool): whether the entry that crosses the share is dropped.

    Returns:
        Tensor: bool, with the shape of ``mass``.
    """
    target = share * _sum(mass, dims)
    others = mass
    if forced is not None:
        target = target - _sum(torch.where(forced, mass, 0.0), dims)
        others = torch.where(forced, 0.0, mass)
    ranks = others.view(torch.int32)  # nonnegative floats are ordered as their bits
    least = _least(ranks, others, target, dims)
    above, equal = ranks > least, ranks == least
    left = (target - _sum(torch.where(above, others, 0.0), dims)) / least.view(torch.float32)
    kept = above | (equal & (_places(equal, dims) <= (left.floor() if within else left.ceil())))
    kept = (kept & (others > 0)) | (share == 1)
    return kept if forced is None else kept | forced


def _least(ranks: Tensor, mass: Tensor, target: Tensor, dims: int) -> Tensor:
    """The highest rank such that the entries of this rank and above sum to at least ``target``: int32 [..., 1]."""
    least = torch.zeros_like(target, dtype=torch.int32)
    for shift in range(30, -1, -BITS_PER_PASS):  # 31 bits, as the sign's is 0
        steps = range(1, 2 ** min(BITS_PER_PASS, 31 - shift))
        sums = [_sum(torch.where(ranks >= least + (i << shift), mass, 0.0), dims) for i in steps]
        least = least + (sum((one >= target).to(torch.int32) for one in sums) << shift)
    return least


def _sum(values: Tensor, dims: int) -> Tensor:
    """Sums over the last dimension, then over the one before: one sum per head would leave most of a GPU idle."""
    sums = values.sum(-1, keepdim=True)
    return sums if dims == 1 else sums.sum(-2, keepdim=True)


def _places(table: Tensor, dims: int) -> Tensor:
    """The index of each True entry among the True entries of its row or table, from 1: int32."""
    places = table.cumsum(-1, dtype=torch.int32)
    if dims == 1:
        return places
    rows = table.sum(-1, keepdim=True, dtype=torch.int32)
    return places + rows.cumsum(-2, dtype=torch.int32) - rows

"""Density and recall of a keep table, and its comparison with the best table."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.true_mass import check_blocks

# Larger than the rounding of sums in another order, smaller than any attention that matters to a recall.
ROUNDING = 1e-9


def spread_blocks(n_q: int, count: int) -> list[int]:
    """Query blocks to measure, spread evenly over a prompt and including the last one.

    Args:
        n_q (int): number of query blocks of the prompt, at least 1.
        count (int): the largest number of blocks to return, at least 1.

    Returns:
        list[int]: ``min(count, n_q)`` query blocks in ascending order.

    Raises:
        ValueError: if a number is under 1.
    """
    check_tokens("n_q", n_q, least=1)
    check_tokens("count", count, least=1)
    count = min(count, n_q)
    return sorted({round((i + 1) * n_q / count) - 1 for i in range(count)})


def density(keep: Tensor, prompt: Prompt, query_blocks: Sequence[int] | None = None) -> Tensor:
    """Share of the visible blocks that a table keeps; dense attention has 1.

    Args:
        keep (Tensor): bool [B or 1, H or 1, n_q, n_k].
        prompt (Prompt): what the tokens are.
        query_blocks (Sequence[int] | None): query blocks to count, each in [0, n_q). Default: all.

    Returns:
        Tensor: fp32 [B or 1, H or 1]; 0 if nothing is visible.

    Raises:
        ValueError: if a block is out of range, or the table doesn't fit the prompt.
    """
    _check_table(keep, (prompt.n_q, prompt.n_k))
    visible = prompt.visible(keep.device)
    if query_blocks is not None:
        check_blocks(query_blocks, prompt)
        keep, visible = _rows(keep, query_blocks), _rows(visible, query_blocks)
    return (keep & visible).sum((-2, -1)) / visible.sum((-2, -1)).clamp(min=1)


def recall(mass: Tensor, keep: Tensor, query_blocks: Sequence[int]) -> Tensor:
    """Share of the true attention in the kept blocks of a table.

    Args:
        mass (Tensor): from :func:`true_mass`, fp32 [B, Hq, len(query_blocks), n_k].
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k].
        query_blocks (Sequence[int]): the query blocks of ``mass``.

    Returns:
        Tensor: [B, Hq, len(query_blocks)], of the dtype of ``mass``; 0 for query blocks of padding.

    Raises:
        ValueError: if the mass, the table and the query blocks don't fit each other.
    """
    _check_rows(mass, keep, query_blocks)
    return (mass * _rows(keep, query_blocks)).sum(-1) / mass.sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)


def worst(values: Tensor, share: float = 0.01) -> float:
    """Mean of the lowest values, which the mean of all recalls hides.

    Args:
        values (Tensor): recalls, of any shape with at least one element.
        share (float): share of the values to take, in (0, 1]; at least one value is taken. Default: 0.01.

    Returns:
        float: their mean.

    Raises:
        ValueError: if there are no values, one is NaN, or the share is out of range.
    """
    if not values.numel():
        raise ValueError("worst needs at least one value, got none.")
    if bool(values.isnan().any()):
        raise ValueError("worst needs numbers, and got NaN.")
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share!r}.")
    count = math.ceil(round(share * values.numel(), 9))
    return float(values.flatten().double().sort().values[:count].mean())


def oracle_density(mass: Tensor, share: float, prompt: Prompt, query_blocks: Sequence[int]) -> float:
    """The smallest density of any table that holds ``share`` of the mass, on average over heads and query blocks.

    Args:
        mass (Tensor): from :func:`true_mass`, fp32 [B, Hq, len(query_blocks), n_k].
        share (float): recall to reach.
        prompt (Prompt): what the tokens are.
        query_blocks (Sequence[int]): the query blocks of ``mass``.

    Returns:
        float: blocks needed over blocks visible.

    Raises:
        ValueError: if the share is out of range, or the query blocks aren't those of the mass.
    """
    if not 0 <= share <= 1 + 1e-3:  # rounding may bring a measured recall above 1
        raise ValueError(f"share must lie in [0, 1], got {share!r}.")
    visible = _visible(mass, prompt, query_blocks)
    shares = torch.tensor(share, dtype=torch.float64, device=mass.device)
    return int(_needed(mass.flatten(), shares, visible.flatten())) / max(1, int(visible.sum()))


def oracle_density_by_head(mass: Tensor, shares: Tensor, prompt: Prompt, query_blocks: Sequence[int]) -> Tensor:
    """The smallest density of a table of each head that holds its share of the mass, on average over query blocks.

    Args:
        mass (Tensor): from :func:`true_mass`, fp32 [B, Hq, len(query_blocks), n_k].
        shares (Tensor): recall to reach for each head, [B, Hq].
        prompt (Prompt): what the tokens are.
        query_blocks (Sequence[int]): the query blocks of ``mass``.

    Returns:
        Tensor: fp32 [B, Hq], blocks needed over blocks visible.
    """
    visible = _visible(mass, prompt, query_blocks).flatten(2)
    return _needed(mass.flatten(2), shares, visible) / visible.sum(-1).clamp(min=1)


def oracle_gap(mass: Tensor, keep: Tensor, prompt: Prompt, query_blocks: Sequence[int]) -> float:
    """Blocks of a table over the blocks that an oracle needs for the same recall; 1 is the best possible.

    Args:
        mass (Tensor): from :func:`true_mass`, fp32 [B, Hq, len(query_blocks), n_k].
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k].
        prompt (Prompt): what the tokens are.
        query_blocks (Sequence[int]): the query blocks of ``mass``.

    Returns:
        float: the ratio, with both counted in these query blocks.
    """
    _check_rows(mass, keep, query_blocks)
    mass = mass.double()
    kept = mass * _rows(keep, query_blocks)
    reached = float(kept.sum() / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny))
    visible = _visible(mass, prompt, query_blocks)
    shares = torch.tensor(reached, dtype=torch.float64, device=mass.device)
    needed = int(_needed(mass.flatten(), shares, visible.flatten()))
    return int((_rows(keep, query_blocks) & visible).sum()) / max(1, needed)


def overlap(mass: Tensor, keep: Tensor, prompt: Prompt, query_blocks: Sequence[int]) -> float:
    """Share of a table's blocks that are also in the best table of the same size.

    The best table spreads its blocks freely over heads and query blocks. If blocks of equal mass compete for its last
    places, those of the given table come first.

    Args:
        mass (Tensor): from :func:`true_mass`, fp32 [B, Hq, len(query_blocks), n_k].
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k].
        prompt (Prompt): what the tokens are.
        query_blocks (Sequence[int]): the query blocks of ``mass``.

    Returns:
        float: in [0, 1].
    """
    _check_rows(mass, keep, query_blocks)
    kept = _rows(keep, query_blocks).expand_as(mass)
    return float(_overlap(mass.flatten(), kept.flatten(), _visible(mass, prompt, query_blocks).flatten()))


def overlap_by_head(mass: Tensor, keep: Tensor, prompt: Prompt, query_blocks: Sequence[int]) -> Tensor:
    """:func:`overlap` with the best table of each head, of the same size as the head's table: fp32 [B, Hq]."""
    _check_rows(mass, keep, query_blocks)
    kept = _rows(keep, query_blocks).expand_as(mass)
    return _overlap(mass.flatten(2), kept.flatten(2), _visible(mass, prompt, query_blocks).flatten(2))


def _check_table(keep: Tensor, sizes: tuple[int, int]) -> None:
    if keep.dtype != torch.bool or keep.ndim != 4 or keep.shape[2:] != sizes:
        raise ValueError(
            f"keep must be bool [batch, heads, {sizes[0]}, {sizes[1]}], as of Strategy.keep for this prompt, got "
            f"{keep.dtype} {list(keep.shape)}."
        )


def _check_rows(mass: Tensor, keep: Tensor, query_blocks: Sequence[int]) -> None:
    _check_table(keep, (keep.shape[-2], mass.shape[-1]))
    outside = [i for i in query_blocks if not 0 <= i < keep.shape[2]]
    if outside or len(query_blocks) != mass.shape[2]:
        raise ValueError(
            f"query_blocks must be the {mass.shape[2]} blocks in which the mass was measured, each in 0 to "
            f"{keep.shape[2] - 1}, got {list(query_blocks)}."
        )


def _rows(table: Tensor, query_blocks: Sequence[int]) -> Tensor:
    return table[:, :, torch.as_tensor(query_blocks, device=table.device)]


def _visible(mass: Tensor, prompt: Prompt, query_blocks: Sequence[int]) -> Tensor:
    """Visible blocks of these rows: bool, shaped as ``mass``."""
    check_blocks(query_blocks, prompt)
    if mass.shape[2:] != (len(query_blocks), prompt.n_k):
        raise ValueError(
            f"The mass must be that of {len(query_blocks)} query blocks and {prompt.n_k} key blocks, got "
            f"{list(mass.shape)}: take the prompt and query_blocks that it was measured with."
        )
    return _rows(prompt.visible(mass.device), query_blocks).expand_as(mass)


def _needed(mass: Tensor, shares: Tensor, visible: Tensor) -> Tensor:
    """Number of largest entries of each row that hold a share of it: [..., n] and [...] to int64 [...]."""
    reached = mass.double().sort(dim=-1, descending=True).values.cumsum(-1)
    target = shares[..., None].double() * reached[..., -1:] * (1 - ROUNDING)
    return torch.minimum((reached < target).sum(-1) + 1, visible.sum(-1))


def _overlap(mass: Tensor, keep: Tensor, visible: Tensor) -> Tensor:
    """Share of the kept entries of each row that are among equally many largest entries: [..., n] to [...]."""
    keep = keep & visible
    size = keep.sum(-1, keepdim=True)
    mass = mass.masked_fill(~visible, -1)
    least = mass.sort(dim=-1, descending=True).values.gather(-1, (size - 1).clamp(min=0))
    above = mass > least
    room = size - above.sum(-1, keepdim=True)  # for entries with the mass ``least``
    tied = torch.minimum((keep & (mass == least)).sum(-1, keepdim=True), room)
    shared = (keep & above).sum(-1, keepdim=True) + tied
    return (shared / size.clamp(min=1))[..., 0]

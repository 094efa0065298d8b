"""Keep the highest scores until they hold a share of the sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_fraction
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_selector
from sparse_prefill.selectors.binned import reaching_by_bins
from sparse_prefill.selectors.cutoff import reaching

MIN_BINNED_ENTRIES = 8192  # of a head, from which on a CPU sorts only a few of them

Edge = Literal["reach", "within"]
Scope = Literal["row", "head"]


def cumulative(
    mass: Tensor, share: float | Tensor, edge: Edge = "reach", *, forced: Tensor | None = None, dims: int = 1
) -> Tensor:
    """Mark the highest entries of each row until they hold ``share`` of its sum; of equal ones, the earlier.

    Args:
        mass (Tensor): fp32 [..., n], not negative.
        share (float | Tensor): in [0, 1], one number or one for each row, broadcastable to [..., 1].
        edge (Edge): whether the entry that crosses the share is kept. "reach" keeps it: the sum of the kept entries is
            at least the share, with the fewest entries. "within" drops it: the sum is at most the share.
        forced (Tensor | None): entries that are always kept and are counted first, bool, broadcastable to [..., n].
            Default: None.
        dims (int): number of last dimensions that form a row, 1 or 2. Default: 1.

    Returns:
        Tensor: bool [..., n]. A share of 1 keeps every entry. A smaller share keeps entries of mass 0 only if they are
        forced.
    """
    if mass.is_cuda and mass.ndim == 4:  # a table, where a compiled pass pays off
        share = share if isinstance(share, Tensor) else torch.full((1,) * dims, share, device=mass.device)
        return reaching(mass, share, forced, dims, edge == "within")
    if dims == 2 and mass.device.type == "cpu" and mass.shape[-2] * mass.shape[-1] >= MIN_BINNED_ENTRIES:
        return reaching_by_bins(mass, share, forced, edge == "within")
    if dims == 2:
        flat = None if forced is None else forced.expand_as(mass).flatten(-2)
        return cumulative(mass.flatten(-2), share, edge, forced=flat).view_as(mass)
    rank = mass if forced is None else mass.masked_fill(forced, torch.inf)
    ranked, order = rank.sort(dim=-1, descending=True, stable=True)
    ranked = ranked if forced is None else mass.gather(-1, order)
    total = ranked.cumsum(-1)
    threshold = share * total[..., -1:]
    wanted = (total - ranked < threshold) if edge == "reach" else (total <= threshold)
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, wanted & (ranked > 0)) | (share == 1)
    return kept if forced is None else kept | forced


@register_selector("cumulative")
@dataclass(frozen=True, kw_only=True)
class CumulativeMass:
    """Keep the fewest visible blocks that hold a share of the mass (top-p), per query block or over a whole head.

    With m_1 >= m_2 >= ... the mass of the visible blocks of a row, or of all rows of a head:

        reach:  keep the first n blocks, n the fewest with m_1 + ... + m_n >= share * sum of m
        within: keep the first n blocks, n the most with m_1 + ... + m_n <= share * sum of m

    Args:
        share (float): share of the mass to keep, in (0, 1]. Default: 0.95.
        edge (str): "reach" keeps the block that crosses the share, "within" drops it. Default: "reach".
        scope (str): "row" applies the share to each query block, "head" to all query blocks of a head together, so
            that rows of spread attention get more blocks. Default: "row".

    Raises:
        ValueError: if an option is out of range.
    """

    share: float = 0.95
    edge: Edge = "reach"
    scope: Scope = "row"

    def __post_init__(self) -> None:
        check_fraction("share", self.share)
        for name, choices in (("edge", get_args(Edge)), ("scope", get_args(Scope))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")

    def __call__(self, scores: Tensor, prompt: Prompt) -> Tensor:
        """Select.

        Args:
            scores (Tensor): mass of each block, fp32 [B, H, n_q, n_k], not negative.
            prompt (Prompt): which blocks are visible.

        Returns:
            Tensor: bool [B, H, n_q, n_k].
        """
        mass = scores.masked_fill(~prompt.visible(scores.device), 0)
        return cumulative(mass, self.share, self.edge, dims=1 if self.scope == "row" else 2)

"""Keep the highest scores until they hold a share of the whole."""

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

LONG = 8192  # entries of a head from which on a CPU sorts but a few of them

Edge = Literal["reach", "within"]
Scope = Literal["row", "head"]


def cumulative(
    mass: Tensor, share: float | Tensor, edge: Edge = "reach", *, forced: Tensor | None = None, dims: int = 1
) -> Tensor:
    """Mark the highest entries of rows until they hold ``share`` of a row's sum; of equal ones, the earlier.

    Args:
        mass (Tensor): fp32 [..., n], not negative.
        share (float | Tensor): in [0, 1], one number or one for each row, broadcastable to [..., 1].
        edge (Edge): what happens to the entry that crosses the threshold. "reach": kept, so that the kept sum is
            at least the share, in the fewest entries. "within": dropped, so that the kept sum is at most the share.
        forced (Tensor | None): entries that are kept in any case and counted before all others, bool, broadcastable
            to [..., n]. Default: none.
        dims (int): how many of the last dimensions are a row, 1 or 2. Default: 1.

    Returns:
        Tensor: bool [..., n]. A share of 1 keeps every entry, a smaller one no entry of no mass that isn't forced.
    """
    if mass.is_cuda and mass.ndim == 4:  # a table, for which a compiled pass pays
        share = share if isinstance(share, Tensor) else torch.full((1,) * dims, share, device=mass.device)
        return reaching(mass, share, forced, dims, edge == "within")
    if dims == 2 and mass.device.type == "cpu" and mass.shape[-2] * mass.shape[-1] >= LONG:
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

    Args:
        share (float): share of the mass to keep, in (0, 1]. Default: 0.95.
        edge (str): "reach" keeps the block that crosses the threshold, "within" drops it. Default: "reach".
        scope (str): "row" gives each query block its own budget, "head" spends one over all query blocks of a
            head, so that rows of spread attention get more. Default: "row".

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
            prompt (Prompt): what the tokens are.

        Returns:
            Tensor: bool [B, H, n_q, n_k].
        """
        mass = scores.masked_fill(~prompt.visible(scores.device), 0)
        return cumulative(mass, self.share, self.edge, dims=1 if self.scope == "row" else 2)

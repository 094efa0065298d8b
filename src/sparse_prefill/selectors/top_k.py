"""Keep a fixed number of the highest scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_selector


def top_k(scores: Tensor, k: Tensor | int) -> Tensor:
    """Mark the ``k`` highest entries along the last dimension; of equal ones, the earlier.

    Args:
        scores (Tensor): any shape [..., n].
        k (Tensor | int): number of entries, one for all rows or one for each row, broadcastable to [..., 1].

    Returns:
        Tensor: bool [..., n].
    """
    if isinstance(k, int) and 0 < k < scores.shape[-1]:  # about half the time of a sort
        least = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
        above, equal = scores > least, scores == least
        left = k - above.sum(-1, keepdim=True, dtype=torch.int32)
        return above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= left))
    order = scores.argsort(dim=-1, descending=True, stable=True)
    wanted = torch.arange(scores.shape[-1], device=scores.device) < k
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, wanted.expand_as(order))


@register_selector("top_k")
@dataclass(frozen=True, kw_only=True)
class TopK:
    """Keep the ``k`` visible blocks of each query block with the highest scores; of equal ones, the earlier.

        keep[i] = the k visible blocks j of the highest score[i, j]

    Args:
        k (int): number of blocks to keep, at least 1.

    Raises:
        ValueError: if ``k`` isn't a whole number or is below 1.
    """

    k: int

    def __post_init__(self) -> None:
        check_tokens("k", self.k, least=1)

    def __call__(self, scores: Tensor, prompt: Prompt) -> Tensor:
        """Select.

        Args:
            scores (Tensor): fp32 [B, H, n_q, n_k].
            prompt (Prompt): which blocks are visible.

        Returns:
            Tensor: bool [B, H, n_q, n_k].
        """
        return top_k(scores.masked_fill(~prompt.visible(scores.device), -torch.inf), self.k)

"""Keep what reaches a score."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.core.option_checks import check_nonnegative
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_selector


@register_selector("threshold")
@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Keep the visible blocks that score at least ``threshold``.

    Neither sorts nor sums. Where scores are shares of a query's attention and right, no other choice of as many blocks
    holds more of it on average over heads and query blocks: one whose attention is spread thin keeps less of it than
    one that looks at few blocks, where a share of each would spend most blocks on the former.

    Args:
        threshold (float): score to reach, in [0, 1]; 0 keeps every block. Default: 0.005.

    Raises:
        ValueError: if ``threshold`` is out of range.
    """

    threshold: float = 0.005

    def __post_init__(self) -> None:
        check_nonnegative("threshold", self.threshold)
        if self.threshold > 1:
            raise ValueError(f"threshold must be a number in [0, 1], got {self.threshold!r}.")

    def __call__(self, scores: Tensor, prompt: Prompt) -> Tensor:
        """Select.

        Args:
            scores (Tensor): fp32 [B, H, n_q, n_k], not negative.
            prompt (Prompt): what the tokens are.

        Returns:
            Tensor: bool [B, H, n_q, n_k].
        """
        return (scores >= self.threshold) & prompt.visible(scores.device)

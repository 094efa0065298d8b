"""Keep the scores near the highest one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.core.option_checks import check_nonnegative
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_selector


@register_selector("max_relative")
@dataclass(frozen=True, kw_only=True)
class MaxRelative:
    """Keep the visible blocks of each query block that score at least ``alpha`` times the highest of them.

        keep[i] = the visible blocks j with score[i, j] >= alpha * max over the visible j' of score[i, j']

    This is the selection of FlashPrefill (arXiv 2603.06199) as in its released code. The table isn't sorted or summed,
    and equal scores are kept or dropped together.

    Args:
        alpha (float): share of the highest score, in [0, 1]; 0 keeps every block, 1 only the highest. Default: 0.1.

    Raises:
        ValueError: if ``alpha`` is out of range.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_nonnegative("alpha", self.alpha)
        if self.alpha > 1:
            raise ValueError(f"alpha must be a number in [0, 1], got {self.alpha!r}.")

    def __call__(self, scores: Tensor, prompt: Prompt) -> Tensor:
        """Select.

        Args:
            scores (Tensor): fp32 [B, H, n_q, n_k], not negative.
            prompt (Prompt): which blocks are visible.

        Returns:
            Tensor: bool [B, H, n_q, n_k].
        """
        visible = scores.masked_fill(~prompt.visible(scores.device), 0)
        return visible >= self.alpha * visible.amax(-1, keepdim=True)

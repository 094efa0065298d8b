"""Keep the scores that reach a threshold."""

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

        keep[i] = the visible blocks j with score[i, j] >= threshold

    The table isn't sorted or summed. If the scores are the true attention of the query blocks, no other choice of
    equally many blocks holds more attention on average over heads and query blocks. Rows of spread attention keep less
    of theirs than rows of concentrated attention; a fixed share for each row would spend most blocks on the former.

    Args:
        threshold (float): lowest score to keep, in [0, 1]; 0 keeps every block. Default: 0.005.

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
            prompt (Prompt): which blocks are visible.

        Returns:
            Tensor: bool [B, H, n_q, n_k].
        """
        return (scores >= self.threshold) & prompt.visible(scores.device)

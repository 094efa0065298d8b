"""Attention to the means of skipped blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.estimators import key_means
from sparse_prefill.kernel.segments import Segment
from sparse_prefill.registry import register_wrapper
from sparse_prefill.strategy import Strategy
from sparse_prefill.wrappers.base import Wrapper


@register_wrapper("mean_correction")
@dataclass(frozen=True, kw_only=True)
class MeanCorrection(Wrapper):
    """Attend to the mean of each skipped block, weighted by its length.

    The mean key and the mean value of every block are appended to the keys and values, as one more segment of the same
    kernel and the same softmax. A query block sees the means of the blocks that lie wholly before it and that its mask
    skips. With B = ``block_size``, a skipped block has one logit:

    ```text
    q . (mean key of the block) / sqrt(D) + log(B)       since the mean represents B tokens
    ```

    The selection of the strategy doesn't change. The correction is exact if all keys of a skipped block are equal, for
    any mask and any values. Otherwise it underestimates the weight of a skipped block, most of all if a few of its keys
    have much larger logits. Blocks past the causal edge, blocks with padding or a document's border, and the ragged end
    are never corrected: a row sees their tokens or nothing. Memory is a second copy of keys and values, and heads x n_q
    x n_k of bool, rounded up to a power of two.

    Args:
        of (Strategy | str | Mapping): what to wrap: a strategy, its name, or a mapping of its name and options.

    Raises:
        ValueError: if ``of`` is not a strategy, or already has this correction.
    """

    paper = "FlashPrefill V2, 2026 (arXiv 2608.19758)"
    reference = "qhfan/FlashPrefillv2@0f8e791: test_mean_correction.py"
    use = (
        "Take it around strategies that skip many blocks of little weight, by a fixed pattern or a tight budget. It "
        "adds one block to read per `block_size` blocks of the prompt, and a table look-up that a CPU doesn't "
        "vectorise. It can't restore a single important token of a skipped block. If the values of important keys "
        "differ from their block's mean, it may add error: measure it."
    )
    differs = (
        "As in the released code, a block is corrected only if it ends before the query block's first row. There the "
        "correction is a part of FlashPrefill V2, whose selection the query heads of a key head share. Here it "
        "corrects any strategy, head by head."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        inner: Strategy = self.of
        while isinstance(inner, Wrapper):
            if isinstance(inner, MeanCorrection):
                raise ValueError(f"{inner.label} already has this correction: wrap it once, or blocks count twice.")
            inner = inner.of

    def attend(self, inputs: AttentionInputs, keep: Tensor, segments: Sequence[Segment] = ()) -> Tensor:
        prompt = inputs.prompt
        means = Segment(
            k=key_means(inputs.k, prompt).to(inputs.k.dtype),
            v=key_means(inputs.v, prompt, "value means").to(inputs.v.dtype),
            keep=prompt.fully_visible(keep.device) & ~keep,
            bias=math.log(prompt.block_size),
        )
        return self.of.attend(inputs, keep, (*segments, means))

    def attend_dense(self, inputs: AttentionInputs) -> Tensor:
        return self.of.attend_dense(inputs)  # which skips no block

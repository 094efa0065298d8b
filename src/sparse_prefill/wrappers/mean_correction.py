"""The means of skipped blocks in place of their tokens."""

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
    """Attend to the mean of each skipped block, weighted by its length, where the strategy would drop the block.

    The mean key and the mean value of every block stand behind the tokens as one more segment of the same kernel and
    the same softmax. The rows of a query block see those of the blocks that lie wholly before it and that the table
    doesn't keep, with log(``block_size``) added to the logit, since a mean stands for that many tokens. What the
    strategy selects stays as it is.

    It is exact where all keys of a skipped block are equal, whatever the table and the values. Elsewhere it
    underestimates a skipped block's weight, most of all where a few of its keys stand out. Blocks that reach past the
    causal edge, hold padding or a document's border, and the ragged end are corrected never: a row sees them token by
    token or not at all. Besides a second copy of keys and values, memory is heads x n_q x n_k of bool, rounded up to a
    power of two.

    Args:
        of (Strategy | str | Mapping): what to wrap: a strategy, its name, or a mapping of its name and options.

    Raises:
        ValueError: if ``of`` is no strategy or is corrected by means already.
    """

    paper = "FlashPrefill V2, 2026 (arXiv 2608.19758)"
    reference = "qhfan/FlashPrefillv2@0f8e791: test_mean_correction.py"
    use = (
        "Take it around strategies that skip much by a fixed pattern or a tight budget, and where what is skipped is "
        "many blocks of little weight each. It adds one block to read per `block_size` blocks of the prompt, and a "
        "table look-up that a CPU doesn't vectorise. It can't bring back a single token that a skipped block "
        "hides, and where the few keys that matter have values unlike their block's mean it may do harm: measure it."
    )
    differs = (
        "As in the released code, a block is corrected only if it ends before the query block's first row. There it "
        "belongs to that method's own selection, which the query heads of a key head share; here it corrects any "
        "strategy, head by head."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        inner: Strategy = self.of
        while isinstance(inner, Wrapper):
            if isinstance(inner, MeanCorrection):
                raise ValueError(f"{inner.label} is corrected by means already: wrap it once, or blocks count twice.")
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

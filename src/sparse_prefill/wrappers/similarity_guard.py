"""Blocks that a mean doesn't represent, always kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.core.option_checks import check_finite
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators import dissimilar_blocks
from sparse_prefill.record import stage
from sparse_prefill.registry import register_wrapper
from sparse_prefill.wrappers.base import Wrapper


@register_wrapper("similarity_guard")
@dataclass(frozen=True, kw_only=True)
class SimilarityGuard(Wrapper):
    """Keep the strategy's selection, and the rows and columns of blocks whose tokens aren't similar.

    A method that scores block means misses differences within a block. If the mean cosine similarity of a block's
    tokens is not above ``threshold``, all rows keep that key block, and that query block keeps all visible blocks. The
    guard only adds blocks, after the strategy's own selection and guards.

    The similarity of a block depends only on its own tokens. So a prompt in chunks of whole blocks selects the same
    blocks as in one piece if the wrapped strategy does.

    Args:
        of (Strategy | str | Mapping): what to wrap: a strategy, its name, or a mapping of its name and options.
        threshold (float): mean cosine similarity of a block's tokens above which the strategy decides. A negative value
            adds no block, one above 1 keeps everything. Default: 0.6.

    Raises:
        ValueError: if ``of`` is not a strategy or the threshold not a number.
    """

    paper = "the self-similarity test of SpargeAttention, Zhang et al., ICML 2025 (arXiv 2502.18137)"
    reference = "thu-ml/SpargeAttn@bfd980b: get_block_map_meansim"
    use = """
Take it around methods that pool queries or keys, such as `mean_pool`: it trades density for recall where their means
say little. With rotary embeddings, similarity depends more on the head than on the block, and heads below the threshold
run nearly dense, so measure the density of each layer. Around methods that read true attention it gains nothing.
"""
    differs = """
In the released code, the test is a part of SpargeAttention's selection, which also leaves dissimilar key blocks out of
its softmax: that is `sparge_attention`. Here the wrapped strategy scores them like any other block.
"""

    threshold: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("threshold", self.threshold)

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        prompt = self.prompt_for(q, k, prompt)
        keep = self.of.keep(q, k, prompt)
        with stage("estimate", q.device):
            rows, columns = dissimilar_blocks(q, k, prompt, self.threshold)
        return keep | ((rows | columns) & prompt.visible(q.device))

"""Blocks that a mean can't stand for, kept in any case."""

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
    """Keep, besides what a strategy selects, the rows and columns of blocks whose tokens aren't alike.

    A method that scores block means is blind to what differs within a block. Where the mean cosine similarity of a
    block's tokens is not above ``threshold``, all rows keep that key block, and that query block keeps all it sees. The
    guard only adds blocks, after the strategy's own selection and guards.

    The similarity of a block is that of its own tokens, so the table is the same in chunks of whole blocks wherever
    that of the wrapped strategy is.

    Args:
        of (Strategy | str | Mapping): what to wrap: a strategy, its name, or a mapping of its name and options.
        threshold (float): mean cosine similarity, of the tokens of a block, above which the strategy is trusted. It is
            trusted everywhere under 0, nowhere above 1. Default: 0.6.

    Raises:
        ValueError: if ``of`` is no strategy or the threshold no number.
    """

    paper = "the self-similarity test of SpargeAttention, Zhang et al., ICML 2025 (arXiv 2502.18137)"
    reference = "thu-ml/SpargeAttn@bfd980b: get_block_map_meansim"
    use = """
Around methods that pool queries or keys, such as `mean_pool`: it trades density for recall where their means say
little. With rotary embeddings similarity is more a matter of the head than of the block, and the heads below the
threshold run nearly dense, so measure the density of each layer. Around methods that read true attention it only costs.
"""
    differs = """
In the released code the test is a part of SpargeAttention's selection, where dissimilar key blocks also take no part in
the softmax: that is `sparge_attention`. Around another strategy they still do.
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

"""What block means and the last queries agree on, by one threshold for all heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill.estimators import PooledAttention, RepresentativeMass
from sparse_prefill.estimators.pooled import TINY
from sparse_prefill.estimators.representative import by_diagonal
from sparse_prefill.fused import fused
from sparse_prefill.knob import Knob
from sparse_prefill.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import Threshold
from sparse_prefill.strategy import Strategy
from sparse_prefill.validation import check_one_document

EVEN = 0.5  # even shares of attention that a block must be given by default
FLOOR = 0.01  # what either estimate gives, of an even share, to a block at least, and to all beside the first together


@register_strategy("mean_slash")
@dataclass(frozen=True, kw_only=True)
class MeanSlash(Strategy):
    """Keep the blocks that two cheap estimates together give at least a ``threshold`` of a query block's attention.

    One estimate is attention between the means of blocks, which follows each query block, but not what single tokens
    look at. The other is the true attention of the last queries, summed over columns and over diagonals of blocks: it
    is of tokens, but of the last ones, and a block has the larger of its column's and its diagonal's share. What they
    are wrong about differs, so their geometric mean, made to sum to 1 in each row, is closer than either. Neither can
    veto a block: each gives it at least a hundredth of an even share.

    In two places one of them knows better. A mean hides the first token, at which many heads look most: of what is left
    beside the first block, the geometric mean of what the agreement and the last queries say is taken. And what the
    last queries look at is known for themselves, i.e. for the last query block and, if that is shorter than others, for
    the one before it: a question at the end finds what it asks for.

    The threshold is the same for all heads, so a head that looks at few blocks keeps nearly all of its attention, and
    one that spreads it thin keeps less: that takes fewer blocks for the same share of the attention, on average. Where
    each head has to hold a share of its own, take [`flex_prefill`](flex_prefill.md).

    Args:
        threshold (float | None): share of its attention that a query block must give to a block, in [0, 1]; 0 keeps
            everything. Default: half of an even share, i.e. of 1 / n_k, which falls with the length of the prompt as
            the shares of blocks do.
        sink (int): first tokens that every query keeps. Default: 1, i.e. the first block.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range; at a call, if the prompt is of several documents.
    """

    paper = "no paper of its own: the estimates are those of MInference and FlexPrefill (arXiv 2502.20766)"
    use = """
For the most attention in the fewest blocks: the estimate costs two means, one small product and the attention of one
block of queries, and selection is a comparison. Lower the threshold for more. Heads of diffuse attention give way
first: look at the worst heads' recall, or [calibrate](../calibration.md) a threshold for each.
"""
    differs = "There is no released code to differ from."
    chunk_invariant = False
    heads_apart = True
    crossover = 2048
    knob = Knob("threshold", 1.0, 1e-7, scale="log")

    threshold: float | None = None
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            Threshold(threshold=self.threshold)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        check_one_document("mean_slash", "its representative queries would all lie in the last one", prompt)
        vertical, slash, _ = RepresentativeMass()(q, k, prompt)
        last = torch.maximum(vertical[:, :, None], by_diagonal(slash, prompt))
        pooled = PooledAttention()(q, k, prompt)
        known = slice(max(0, prompt.q_len - prompt.block_size) // prompt.block_size, None)
        last[:, :, known] = pooled[:, :, known] = vertical[:, :, None]
        visible = prompt.visible(q.device)
        return _agreement(pooled, last, prompt.first(1, q.device) & visible, visible)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        threshold = EVEN / prompt.n_k if self.threshold is None else self.threshold
        return Threshold(threshold=threshold)(scores, prompt)


@fused
def _agreement(pooled: Tensor, last: Tensor, first: Tensor, visible: Tensor) -> Tensor:
    """Shares that both estimates give to blocks [B, Hq, n_q, n_k]; each row sums to 1 over those that are visible.

    ``first`` is the block of the first token, bool. On how much is beside it, ``last`` has a say of its own.
    """
    floor = FLOOR / visible.sum(-1, keepdim=True).clamp(min=1)
    both = torch.where(visible, ((pooled + floor) * (last + floor)).sqrt(), 0.0)
    shares = both / both.sum(-1, keepdim=True).clamp(min=TINY)
    beside, of_last = (1 - torch.where(first, x, 0.0).sum(-1, keepdim=True) for x in (shares, last))
    beside = beside.clamp(min=TINY)
    scale = (of_last.clamp(min=FLOOR) / beside).sqrt()
    return torch.where(first, 1 - beside * scale, shares * scale)

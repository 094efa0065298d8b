"""XAttention: sums along antidiagonals tell which blocks hold the attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.estimators import Antidiagonal
from sparse_prefill.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors.cumulative import cumulative
from sparse_prefill.strategy import Strategy

OFFICIAL_TOKENS = 16384  # longer prompts are scored in several chunks by the released code


@register_strategy("xattention")
@dataclass(frozen=True, kw_only=True)
class XAttention(Strategy):
    """XAttention: in each query block, the fewest key blocks that hold a share of the antidiagonal scores.

    Tiles of ``stride`` x ``stride`` token pairs are scored by the mean along their antidiagonals, as
    :class:`~sparse_prefill.estimators.Antidiagonal` says. A query block's own block and the first block are kept in any
    case and counted first; the highest of the others follow until ``threshold`` of the row is reached.

    A row depends on its own queries and on the keys up to its own block alone. So a prompt that is prefilled in chunks
    of whole blocks selects what it selects in one piece, up to the rounding of the dtype; chunks at other offsets cut
    their query blocks and tiles elsewhere.

    With ``official=True`` the selection is that of the released code, which keeps about one block more in each row of
    a prompt of up to 16,384 tokens; it takes such whole, unpadded prompts only.

    Args:
        stride (int): tokens in a tile, 4, 8 or 16. Default: 8.
        threshold (float | tuple[float, ...]): share of a row's score to keep, in [0, 1]; one number, or one for each
            query head. Default: 0.9.
        official (bool): select as the released code does. Default: False.
        **guards: see :class:`~sparse_prefill.Strategy`; ``sink`` is 1 token, i.e. the first block is always kept.
            With 0 it has to earn its place. What larger guards keep isn't counted for the threshold.

    Raises:
        ValueError: if an option is out of range; at a call, if there is not one threshold for each head, if the prompt
            is of several documents, or, with ``official=True``, if it is a chunk, padded or longer than 16,384 tokens.
    """

    paper = "XAttention, Xu et al., ICML 2025 (arXiv 2503.16428)"

    stride: int = 8
    threshold: float | tuple[float, ...] = 0.9
    official: bool = False
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        Antidiagonal(stride=self.stride)
        if isinstance(self.threshold, list):  # as configuration files have them
            object.__setattr__(self, "threshold", tuple(self.threshold))
        each = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        numbers = all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t <= 1 for t in each)
        if not each or not numbers:
            raise ValueError(
                f"threshold must be a number in [0, 1], or one for each query head, got {self.threshold!r}."
            )
        if not isinstance(self.official, bool):
            raise ValueError(f"official must be True or False, got {self.official!r}.")

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        if isinstance(self.threshold, tuple) and len(self.threshold) != q.shape[1]:
            raise ValueError(
                f"threshold has {len(self.threshold)} numbers and q has {q.shape[1]} heads: give one number for each "
                "query head, or a single one for all."
            )
        if self.official and (prompt.offset or prompt.left_padding is not None or prompt.kv_len > OFFICIAL_TOKENS):
            raise ValueError(
                f"xattention with official=True takes whole unpadded prompts of up to {OFFICIAL_TOKENS:,} tokens, as "
                "the released code in one chunk: drop official=True for chunks, prefixes, padding and longer prompts."
            )
        return Antidiagonal(stride=self.stride)(q, k, prompt)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        device = scores.device
        each = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        share = torch.tensor(each, dtype=scores.dtype, device=device)[:, None, None]  # [Hq or 1, 1, 1]
        own = prompt.diagonal(device)
        if self.official:
            return official_keep(scores, share, own)
        first = prompt.first(1, device) & prompt.visible(device)
        return cumulative(scores, share, forced=own | first if self.sink else own)


def official_keep(scores: Tensor, share: Tensor, own: Tensor) -> Tensor:
    """The rule of the released code for prompts of a single chunk: bool [B, Hq, n, n].

    It means to count the own and the first block before all others, but only the own block is marked so, while the
    sums that the others are compared with still are those of two forced entries: each lags one behind.

    Args:
        scores (Tensor): fp32 [B, Hq, n, n].
        share (Tensor): share of a row to keep, fp32 [Hq or 1, 1, 1].
        own (Tensor): each row's own block, bool [1, 1, n, n].
    """
    mass = scores.double()
    others, order = mass.masked_fill(own, 0).sort(dim=-1, descending=True, stable=True)
    before = F.pad(others.cumsum(-1), (2, 0))[..., :-2] + (mass * own).sum(-1, keepdim=True)
    before[..., 0] = 0  # the highest of the others is kept in any case
    keep = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, before < share * mass.sum(-1, keepdim=True))
    keep[..., 0] = True
    return keep

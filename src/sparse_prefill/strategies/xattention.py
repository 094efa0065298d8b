"""XAttention: sums along antidiagonals estimate which blocks hold the attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.constants import constants
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators import Antidiagonal
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors.cumulative import cumulative
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption

OFFICIAL_TOKENS = 16384  # longer prompts are scored in several chunks by the released code


@register_strategy("xattention")
@dataclass(frozen=True, kw_only=True)
class XAttention(Strategy):
    """XAttention: keep, in each query block, the fewest key blocks that hold a share of the antidiagonal scores.

    The attention map is cut into tiles of S x S token pairs, where S is the ``stride``. Only the antidiagonal of each
    tile is computed. It meets every query and every key of the tile once, and crosses each column and each diagonal
    that runs through the tile, so it misses neither pattern:

    ```text
    L(I, J) = 1 / (S sqrt(D)) * sum over s < S of q[I S + S - 1 - s] . k[J S + s]
    A(i, j) = sum over the tiles of block (i, j) of softmax over J <= I of L(I, J)
    keep      the own block, the first block, then the highest A(i, j) until they hold threshold * sum over j of A(i, j)
    ```

    See :class:`~sparse_prefill.estimators.Antidiagonal`. ``threshold`` refers to A, not to the true attention. Products
    of S pairs are averaged before the softmax, so a single large logit counts with an S-th of its value and may be
    missed. Missing tokens of a tile, at the ragged end or in left padding, count as zero vectors, as in the released
    code.

    A row depends only on its own queries and on keys up to its own block. So a prompt in chunks of whole blocks
    selects the same blocks as in one piece, up to the rounding of the dtype. Chunks at other offsets have other query
    blocks and tiles. With ``official=True`` the selection equals the released code, for whole unpadded prompts of up
    to 16,384 tokens.

    Args:
        stride (int): tokens in a tile, 4, 8 or 16; more is faster and coarser. Default: 8.
        threshold (float | tuple[float, ...]): share of a row's score to keep, in [0, 1]; one number, or one for each
            query head, in order and for every layer that the strategy runs in. 0 keeps only the two forced blocks, 1
            everything. Default: 0.9.
        official (bool): select as the released code does. Default: False.
        **guards: see :class:`~sparse_prefill.Strategy`; ``sink`` is 1 token, i.e. the first block is always kept.
            With 0 the first block isn't forced. Blocks of larger guards don't count for the threshold.

    Raises:
        ValueError: if an option is out of range; at a call, if there is not one threshold for each head, or, with
            ``official=True``, if the prompt is a chunk, padded or longer than 16,384 tokens; from ``keep``, if it
            has several documents.
    """

    paper = "XAttention, Xu et al., ICML 2025 (arXiv 2503.16428)"
    reference = (
        "mit-han-lab/x-attention@e379887: xattn/src/Xattention.py; mit-han-lab/x-attention@e379887: xattn/src/utils.py"
    )
    use = """
Take it if every query block matters and not only the last ones, and if chunks have to agree with the whole prompt. The
estimate is a `stride`-th of the work of dense attention, so it grows with the square of the prompt. Measure its recall
with [`evaluation.recall`](../api.md#measures).
"""
    differs = """
With `official=True` the selection equals the released code, for prompts that it scores in a single chunk and for
comparison with published results. The default mode differs in these points:

| | released code | default |
|---|---|---|
| blocks that are kept (`official=True`) | in the first chunk, that is in prompts of up to 16,384 tokens, the first block isn't counted before the others, and the sums that the others are compared with lag by one block: about one more block in each row | the fewest that reach `threshold` besides the two forced ones |
| history | lost after the first chunk, in its PyTorch path, if a prompt is a whole number of chunks, such as a power of two over 16,384 | kept at every length |
| `keep_sink` | marks the first row of blocks | `sink` marks the first column |
| chunks and prefixes | right only after whole chunks of the code's chunk size | right at any offset: key tiles lie on the grid of key positions, query tiles on that of query rows, so that none lies across two blocks |
| batches, left padding | no | yes |
| grouped heads | keys have to be repeated | each key head is read as it is |
| block size | 128 | any that the library takes |
| thresholds | tables for Llama 3.1 8B are part of it | none: [calibrate](../calibration.md) your own by head |

`official=True` refuses chunks, prefixes, left padding and longer prompts with a `ValueError`.
"""  # noqa: E501
    chunk_invariant = True
    head_independent = True
    crossover = 2048
    tunable = TunableOption("threshold", 0.0, 1.0, per_head=True)

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

    @property
    def indexes_heads(self) -> bool:
        return isinstance(self.threshold, tuple)

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
        share = constants(each, scores.dtype, device)[:, None, None]  # [Hq or 1, 1, 1]
        own = prompt.diagonal(device)
        if self.official:
            return official_keep(scores, share, own)
        first = prompt.sink_blocks(1, device) & prompt.visible(device)
        return cumulative(scores, share, forced=own | first if self.sink else own)


def official_keep(scores: Tensor, share: Tensor, own: Tensor) -> Tensor:
    """The rule of the released code for prompts of a single chunk: bool [B, Hq, n, n].

    The code means to count the own and the first block before all others, but it marks only the own block. The sums
    of the others still assume two forced entries, so each lags by one entry.

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

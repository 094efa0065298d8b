"""Attention of one averaged head in place of many, on a grid of every few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.fused import compile_on_gpu, exp2_shifted
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_mass import blocks_of_gpu
from sparse_prefill.estimators.block_shares import LOG2_E
from sparse_prefill.registry import register_estimator

STRIDES = (1, 2, 4, 8, 16)
LOGITS = 2**24  # most that a CPU holds at once, unless one query block has more
BLOCKS = 8  # most query blocks that a CPU takes at once; more of them fall out of its cache


@register_estimator("proxy_heads")
@dataclass(frozen=True, kw_only=True)
class ProxyHeads:
    """The highest attention probability in each block of a proxy head, the mean of the heads of a group.

    Groups are of consecutive key heads with all their query heads. A proxy's queries and keys are the means over the
    heads of its group, of the first token of each window of ``stride`` tokens. Its attention is a softmax over the keys
    among these that a query may see, and a block's score is the highest probability in it.

    Windows of keys lie on the grid of key positions, those of queries on that of query rows. Where padding ends within
    a window, its first token is padding and the up to ``stride - 1`` real ones aren't scored. Blocks in which nothing
    is scored have 0.

    Computed in fp32, some query blocks at a time: besides the scores and the proxies, which are B x groups x
    (M + N) / stride x D, scratch memory is two tables of 2^24 logits (2^27 on a GPU), or of one query block's
    B x groups x block_size / stride x N / stride if these are more: 0.2 GB on a CPU.

    Args:
        groups (int): proxy heads, a number that divides the key heads. Default: 1.
        stride (int): tokens in a window, 1, 2, 4, 8 or 16. Default: 4.

    Raises:
        ValueError: if an option is out of range; at a call, if ``groups`` doesn't divide the key heads.
    """

    groups: int = 1
    stride: int = 4

    def __post_init__(self) -> None:
        check_tokens("groups", self.groups, least=1)
        check_tokens("stride", self.stride)
        if self.stride not in STRIDES:
            raise ValueError(f"stride must be one of {', '.join(map(str, STRIDES))}, got {self.stride!r}.")

    @own_precision
    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): what the tokens are.

        Returns:
            Tensor: fp32 [B, groups, n_q, n_k], in [0, 1].
        """
        if k.shape[1] % self.groups:
            raise ValueError(
                f"groups={self.groups} doesn't divide the {k.shape[1]} key heads: a group is of whole key heads, so "
                "take a divisor."
            )
        queries, keys = self._proxy(q) * (LOG2_E * q.shape[-1] ** -0.5), self._proxy(k)
        rows = prompt.query_positions(q.device)[:: self.stride]
        columns = torch.arange(0, prompt.kv_len, self.stride, device=q.device)
        per_block = prompt.block_size // self.stride
        held = q.shape[0] * self.groups * per_block * keys.shape[2]
        at_most = min(BLOCKS, LOGITS // held) if q.device.type == "cpu" else blocks_of_gpu(held, prompt.n_q)
        blocks = max(1, at_most)
        parts = []
        for first in range(0, prompt.n_q, blocks):
            part = slice(first * per_block, (first + blocks) * per_block)
            begin = prompt.offset + first * prompt.block_size
            end = prompt.offset + min((first + blocks) * prompt.block_size, prompt.q_len)
            seen = -(-end // self.stride)  # later keys are in no row's sight
            free = begin // self.stride if prompt.is_causal else 0  # earlier ones are in every row's
            allowed = prompt.may_attend(rows[part], columns[free:seen])
            highest = _highest(queries[:, :, part], keys[:, :, :seen], allowed, per_block)
            parts.append(F.pad(highest, (0, prompt.n_k - highest.shape[-1])))
        return torch.cat(parts, dim=2)

    def _proxy(self, x: Tensor) -> Tensor:
        """Mean over the heads of each group, at the first token of each window: fp32 [B, groups, windows, D]."""
        return x[:, :, :: self.stride].unflatten(1, (self.groups, -1)).mean(2, dtype=torch.float32)


def _highest(q: Tensor, k: Tensor, allowed: Tensor, size: int) -> Tensor:
    """The highest softmax probability, to base 2, in each block of ``size`` rows and columns; 0 where there is none.

    Args:
        q (Tensor): fp32 [B, H, m, D], scaled.
        k (Tensor): fp32 [B, H, n, D].
        allowed (Tensor): which pairs may attend, bool [B or 1, 1, m, l], for the last l columns; those before may.
        size (int): rows, and columns, in a block.

    Returns:
        Tensor: fp32 [B, H, ceil(m / size), ceil(n / size)].
    """
    logits = q @ k.mT
    logits[..., logits.shape[-1] - allowed.shape[-1] :].masked_fill_(~allowed, -torch.inf)
    return _highest_probability(logits, size)


@compile_on_gpu
def _highest_probability(logits: Tensor, size: int) -> Tensor:
    """The same of logits, fp32 [B, H, m, n], which may be overwritten."""
    whole = F.pad(logits, (0, -logits.shape[-1] % size), value=-torch.inf) if logits.shape[-1] % size else logits
    highest = whole.unflatten(-1, (-1, size)).amax(-1)  # [B, H, m, blocks]
    peak = highest.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)  # finite where a row sees nothing
    total = exp2_shifted(logits, peak).sum(-1, keepdim=True)
    probability = (highest - peak).exp2() / total.clamp(min=torch.finfo(logits.dtype).tiny)
    probability = F.pad(probability, (0, 0, 0, -probability.shape[2] % size))
    return probability.unflatten(2, (-1, size)).amax(3)

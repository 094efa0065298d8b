"""Attention of an averaged head in place of many, between every few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.fused import compile_on_gpu, exp2_shifted
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_mass import gpu_query_blocks
from sparse_prefill.estimators.block_shares import LOG2_E
from sparse_prefill.registry import register_estimator

STRIDES = (1, 2, 4, 8, 16)
MAX_LOGITS_CPU = 2**24  # held at once, unless one query block has more
MAX_QUERY_BLOCKS_CPU = 8  # taken at once; more of them leave its cache


@register_estimator("proxy_heads")
@dataclass(frozen=True, kw_only=True)
class ProxyHeads:
    """The highest attention probability of a proxy head in each block. A proxy head is the mean of a group of heads.

    A group is some consecutive key heads with all their query heads. With S the stride and Q_g, K_g the means of the
    queries and of the keys over the heads of group g, of every S-th token only:

        P_g = softmax over the keys that each query may attend to of Q_g K_g^T / sqrt(D)
        score[g, i, j] = max of P_g over the sampled queries of block i and the sampled keys of block j

    This is after ProxyAttn (arXiv 2509.24745). Windows of S keys start at multiples of S of the key positions, windows
    of queries at multiples of S of the query rows; the first token of each is sampled. Where left padding ends within a
    window, the first token is padding, so the up to S - 1 real tokens of this window aren't scored. Blocks without
    scored tokens have 0.

    Scores are computed in fp32 for some query blocks at a time. Scratch memory is the proxies, B x groups x
    (M + N) / stride x D, and two tables of 2^24 logits (2^28 on a GPU), or of the logits of one query block,
    B x groups x block_size / stride x N / stride, if that is more: 0.2 GB on a CPU.

    Args:
        groups (int): number of proxy heads, which divides the number of key heads. Default: 1.
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
            prompt (Prompt): lengths and padding of the tokens.

        Returns:
            Tensor: fp32 [B, groups, n_q, n_k], in [0, 1].
        """
        if k.shape[1] % self.groups:
            raise ValueError(
                f"groups={self.groups} doesn't divide the {k.shape[1]} key heads: a group holds whole key heads, so "
                "take a divisor."
            )
        queries, keys = self._proxy(q) * (LOG2_E * q.shape[-1] ** -0.5), self._proxy(k)
        rows = prompt.query_positions(q.device)[:: self.stride]
        columns = torch.arange(0, prompt.kv_len, self.stride, device=q.device)
        per_block = prompt.block_size // self.stride
        logits = q.shape[0] * self.groups * per_block * keys.shape[2]  # of a query block
        if q.device.type == "cpu":
            blocks = max(1, min(MAX_QUERY_BLOCKS_CPU, MAX_LOGITS_CPU // logits))
        else:
            blocks = gpu_query_blocks(logits, prompt.n_q)
        parts = []
        for first in range(0, prompt.n_q, blocks):
            part = slice(first * per_block, (first + blocks) * per_block)
            begin = prompt.offset + first * prompt.block_size
            end = prompt.offset + min((first + blocks) * prompt.block_size, prompt.q_len)
            seen = -(-end // self.stride)  # no row sees later keys
            free = begin // self.stride if prompt.is_causal else 0  # all rows see earlier ones
            allowed = prompt.may_attend(rows[part], columns[free:seen])
            highest = _highest(queries[:, :, part], keys[:, :, :seen], allowed, per_block)
            parts.append(F.pad(highest, (0, prompt.n_k - highest.shape[-1])))
        return torch.cat(parts, dim=2)

    def _proxy(self, x: Tensor) -> Tensor:
        """Mean over the heads of each group, at the first token of each window: fp32 [B, groups, windows, D]."""
        return x[:, :, :: self.stride].unflatten(1, (self.groups, -1)).mean(2, dtype=torch.float32)


def _highest(q: Tensor, k: Tensor, allowed: Tensor, size: int) -> Tensor:
    """The highest probability of a softmax to base 2 in each block of ``size`` rows and columns; 0 without any pair.

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
    """As :func:`_highest`, from masked logits, fp32 [B, H, m, n], which may be overwritten."""
    whole = F.pad(logits, (0, -logits.shape[-1] % size), value=-torch.inf) if logits.shape[-1] % size else logits
    highest = whole.unflatten(-1, (-1, size)).amax(-1)  # [B, H, m, blocks]
    peak = highest.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)  # finite for a row without keys
    total = exp2_shifted(logits, peak).sum(-1, keepdim=True)
    probability = (highest - peak).exp2() / total.clamp(min=torch.finfo(logits.dtype).tiny)
    probability = F.pad(probability, (0, 0, 0, -probability.shape[2] % size))
    return probability.unflatten(2, (-1, size)).amax(3)

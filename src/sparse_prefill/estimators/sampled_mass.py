"""Exact attention of queries at equal distances, as a sample of the whole prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.option_checks import check_fraction, check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_mass import attention_mass
from sparse_prefill.registry import register_estimator

MAX_ROWS = 64  # queries taken at once: more of them lie further apart, so that more of their logits are masked


@register_estimator("sampled_mass")
@dataclass(frozen=True, kw_only=True)
class SampledMass:
    """Exact attention of the last query and of every ``stride``-th before it, by key block, mean over these queries.

    With R the sampled queries and mass[r, j] the attention of query r to key block j:

        score[j] = mean over r in R of mass[r, j], without the blocks j in the window of r

    The idea is that of SampleAttention (arXiv 2406.15486). The sample is counted from the end, so that neither left
    padding nor a cached prefix moves it. With a ``window``, the scores show the attention beyond it: a head that
    attends only to near keys has 0 everywhere.

    The work is less than that of dense attention divided by ``stride``. Scratch memory is B x Hq x 64 x n_k in fp32, as
    64 queries are taken at once, and the memory of :func:`attention_mass`.

    Args:
        stride (int): distance between sampled queries, at least 1. Default: 20.
        window (float | None): size of the window as a share of the prompt's real tokens, in (0, 1]: see
            :func:`window_blocks`. Default: None, no window.

    Raises:
        ValueError: if an option is out of range.
    """

    stride: int = 20
    window: float | None = None

    def __post_init__(self) -> None:
        check_tokens("stride", self.stride, least=1)
        if self.window is not None:
            check_fraction("window", self.window)

    @own_precision
    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): lengths and padding of the tokens.

        Returns:
            Tensor: fp32 [B, Hq, 1, n_k], the same for all query blocks. Sums to 1, or to less with a window.
        """
        sample = range((prompt.q_len - 1) % self.stride, prompt.q_len, self.stride)
        parts = [sample[i : i + MAX_ROWS] for i in range(0, len(sample), MAX_ROWS)]
        total = torch.zeros(q.shape[0], q.shape[1], 1, prompt.n_k, device=q.device)
        for rows in parts:
            total = total + self._sum(q, k, prompt, rows)
        positions = prompt.query_positions(q.device)[sample.start :: self.stride]
        real = (positions >= prompt.start(q.device)[:, None]).sum(1).clamp(min=1)  # [B]
        return total / real[:, None, None, None]

    def _sum(self, q: Tensor, k: Tensor, prompt: Prompt, rows: range) -> Tensor:
        """Sum over some rows: fp32 [B, Hq, 1, n_k]."""
        size, device = prompt.block_size, q.device
        end = rows[-1] + 1
        seen = min(-(-(prompt.offset + end) // size) * size, prompt.kv_len)  # no row sees later keys
        index = torch.arange(rows.start, end, self.stride, device=device)
        keys = torch.arange(prompt.num_common_keys(prompt.offset + rows.start), seen, device=device)
        allowed = prompt.may_attend(index + prompt.offset, keys)
        mass = attention_mass(q[:, :, rows.start : end : self.stride], k[:, :, :seen], allowed, size)
        if self.window is not None:
            near = window_blocks(self.window, prompt, device)[:, :, index // size, : mass.shape[-1]]
            mass = mass.masked_fill(near, 0)
        return F.pad(mass.sum(2, keepdim=True), (0, prompt.n_k - mass.shape[-1]))


def window_blocks(share: float, prompt: Prompt, device: torch.device | str = "cpu") -> Tensor:
    """Block pairs with a token pair less than ``share`` of the prompt's real tokens apart: bool [B, 1, n_q, n_k].

    Causality isn't applied. Each row's own block is in its window. In a chunk whose prompt gives ``total_len``, the
    share is taken of the whole prompt.
    """
    size = prompt.block_size
    whole = prompt.kv_len if prompt.total_len is None else prompt.total_len
    tokens = (share * (whole - prompt.start(device)).double()).ceil()  # [B]
    first_query = prompt.query_positions(device)[::size]
    last_key = (torch.arange(1, prompt.n_k + 1, device=device) * size).clamp(max=prompt.kv_len) - 1
    return (first_query[:, None] - last_key < tokens[:, None, None])[:, None]

"""True attention of every so-many-th query, which stand for the whole prompt."""

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

ROWS = 64  # queries that are taken at once: more of them reach further apart, over more keys that some do not see


@register_estimator("sampled_mass")
@dataclass(frozen=True, kw_only=True)
class SampledMass:
    """Exact attention of the last query and of every ``stride``-th before it, by key block, mean over these queries.

    Counted from the end, so that neither padding in front nor a cached prefix moves the sample. With a ``window``, what
    the near blocks hold is left out: the scores tell what has to be looked for beyond it, and a head that looks at near
    keys alone has 0 everywhere.

    The work is less than a ``stride``-th of that of dense attention. The queries are taken 64 at once; scratch memory
    is B x Hq x 64 x n_k in fp32, besides what :func:`attention_mass` needs.

    Args:
        stride (int): queries from one of the sample to the next, at least 1. Default: 20.
        window (float | None): share of the prompt's real tokens, in (0, 1], as for :func:`window_blocks`.
            Default: none, all blocks count.

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
            prompt (Prompt): what the tokens are.

        Returns:
            Tensor: fp32 [B, Hq, 1, n_k], the same for all query blocks. Sums to 1, less what is left out.
        """
        sample = range((prompt.q_len - 1) % self.stride, prompt.q_len, self.stride)
        parts = [sample[i : i + ROWS] for i in range(0, len(sample), ROWS)]
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
        seen = min(-(-(prompt.offset + end) // size) * size, prompt.kv_len)  # later keys are in no row's sight
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

    Causality aside, and at least a row's own block, as for :meth:`~sparse_prefill.Prompt.local_blocks`. A chunk that
    knows the length of the whole prompt takes the share of that.
    """
    size = prompt.block_size
    whole = prompt.kv_len if prompt.total_len is None else prompt.total_len
    tokens = (share * (whole - prompt.start(device)).double()).ceil()  # [B]
    first_query = prompt.query_positions(device)[::size]
    last_key = (torch.arange(1, prompt.n_k + 1, device=device) * size).clamp(max=prompt.kv_len) - 1
    return (first_query[:, None] - last_key < tokens[:, None, None])[:, None]

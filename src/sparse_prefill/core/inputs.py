"""The inputs of one attention call, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sparse_prefill.core.logits import PLAIN, Logits
from sparse_prefill.core.prompt import Prompt


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionInputs:
    """What one call of attention is given: tensors, the prompt that they belong to, and how logits are made.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        v (Tensor): values [B, Hkv, N, Dv].
        prompt (Prompt): what the tokens are, M = ``prompt.q_len`` and N = ``prompt.kv_len``.
        logits (Logits): scale, soft cap and sinks. Default: products times D ** -0.5.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    prompt: Prompt
    logits: Logits = PLAIN

    @property
    def scored_q(self) -> Tensor:
        """Queries as strategies score them, [B, Hq, M, D]: these use the usual scale, so another one is in q."""
        return self._scored[0]

    @property
    def scored_k(self) -> Tensor:
        """Keys as strategies score them, [B, Hkv, N, D], in the dtype of :attr:`scored_q`."""
        return self._scored[1]

    @cached_property
    def _scored(self) -> tuple[Tensor, Tensor]:
        if self.logits.scale is None:
            return self.q, self.k
        factor = self.logits.scale * self.q.shape[-1] ** 0.5
        if self.q.dtype == torch.float16 and factor > 1:  # float16 ends at 65504
            return self.q.float() * factor, self.k.float()
        return self.q * factor, self.k

    def of_heads(self, heads: slice, key_heads: slice, prompt: Prompt) -> AttentionInputs:
        """The inputs of some query heads and their key heads."""
        sinks = self.logits.sinks
        logits = self.logits if sinks is None else replace(self.logits, sinks=sinks[heads])
        q, k, v = self.q[:, heads], self.k[:, key_heads], self.v[:, key_heads]
        return AttentionInputs(q=q, k=k, v=v, prompt=prompt, logits=logits)

    def of_tokens(self, rows: slice, queries: slice, keys: slice, prompt: Prompt) -> AttentionInputs:
        """The inputs of some rows of the batch, of some of their queries and keys."""
        q, k, v = self.q[rows, :, queries], self.k[rows, :, keys], self.v[rows, :, keys]
        return AttentionInputs(q=q, k=k, v=v, prompt=prompt, logits=self.logits)

    def with_prompt(self, prompt: Prompt) -> AttentionInputs:
        """The same tensors under another prompt."""
        return replace(self, prompt=prompt)

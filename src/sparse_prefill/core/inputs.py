"""The inputs of one attention call, as one value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sparse_prefill.core.logits import PLAIN, Logits
from sparse_prefill.core.prompt import Prompt, SubPrompt


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionInputs:
    """The inputs of one attention call: tensors, their prompt, and the options of logits.

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
        """Queries for scoring, [B, Hq, M, D]. Strategies score with the scale D ** -0.5: q includes any other."""
        return self._scored[0]

    @property
    def scored_k(self) -> Tensor:
        """Keys for scoring, [B, Hkv, N, D], in the dtype of :attr:`scored_q`."""
        return self._scored[1]

    @cached_property
    def _scored(self) -> tuple[Tensor, Tensor]:
        if self.logits.scale is None:
            return self.q, self.k
        factor = self.logits.scale * self.q.shape[-1] ** 0.5
        if self.q.dtype == torch.float16 and factor > 1:  # float16 overflows at 65504
            return self.q.float() * factor, self.k.float()
        return self.q * factor, self.k

    def of_heads(self, heads: slice, key_heads: slice, prompt: Prompt) -> AttentionInputs:
        """The inputs of some query heads and their key heads."""
        sinks = self.logits.sinks
        logits = self.logits if sinks is None else replace(self.logits, sinks=sinks[heads])
        q, k, v = self.q[:, heads], self.k[:, key_heads], self.v[:, key_heads]
        return AttentionInputs(q=q, k=k, v=v, prompt=prompt, logits=logits)

    def of_tokens(self, rows: slice, queries: slice, keys: slice, prompt: Prompt) -> AttentionInputs:
        """The inputs of some queries and keys in some rows of the batch."""
        q, k, v = self.q[rows, :, queries], self.k[rows, :, keys], self.v[rows, :, keys]
        return AttentionInputs(q=q, k=k, v=v, prompt=prompt, logits=self.logits)

    def with_prompt(self, prompt: Prompt) -> AttentionInputs:
        """The same tensors with another prompt."""
        return replace(self, prompt=prompt)


def attend_parts(
    inputs: AttentionInputs,
    parts: Iterable[SubPrompt],
    attend: Callable[[AttentionInputs, SubPrompt], Tensor],
) -> Tensor:
    """Attention of the parts of a prompt, one after the other.

    Args:
        inputs (AttentionInputs): inputs of the whole prompt.
        parts (Iterable[SubPrompt]): its sequences or its chunks.
        attend (Callable): returns the output of one part, from its inputs and the part.

    Returns:
        Tensor: [B, Hq, M, Dv]; queries of no part, such as padding, are 0.
    """
    out = inputs.q.new_zeros(*inputs.q.shape[:3], inputs.v.shape[3])
    for part in parts:
        out[part.rows, :, part.queries] = attend(inputs.of_tokens(*part), part)
    return out

"""Everything that is visible: the method that the others are measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.strategy import Strategy


@register_strategy("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(Strategy):
    """Keep every visible block; :func:`~sparse_prefill.sparse_attention` runs SDPA where its causality fits."""

    paper = "full causal attention"

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return scores

    def dense_reason(self, prompt: Prompt) -> str:
        return "strategy"

"""Everything that is visible: the method that the others are measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.strategy import Strategy


@register_strategy("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(Strategy):
    """Keep every visible block: the method that the others are measured against.

    :func:`~sparse_prefill.sparse_attention` runs ``F.scaled_dot_product_attention`` where its causality fits, i.e. for
    whole prompts, each row of a padded batch and each packed document by itself, and for a single query. A chunk or a
    sliding window would need a mask of tokens by tokens there, and goes through FlexAttention with all visible blocks
    instead. Chunks give what the whole prompt gives.

    Args:
        **guards: see :class:`~sparse_prefill.Strategy`. ``block_size`` matters for ``keep`` and ``block_mask``, and
            where FlexAttention runs; all others are of no effect.
    """

    paper = "full causal attention"
    use = """
The baseline, and the strategy of layers and heads that must stay exact in a `Plan` or in `by_head`. Short prompts run
this way with every strategy; see `min_length`.
"""
    differs = "There is no released code to differ from: it is attention as PyTorch has it."
    chunk_invariant = True
    head_independent = True

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return scores

    def dense_reason(self, prompt: Prompt, device: str | torch.device = "cpu") -> str:
        return "strategy"

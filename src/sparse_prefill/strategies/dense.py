"""Full causal attention: the baseline of all other methods."""

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
    """Keep every visible block: full causal attention, the baseline of all other methods.

    :func:`~sparse_prefill.sparse_attention` runs ``F.scaled_dot_product_attention`` for whole prompts, for each row of
    a padded batch, for each packed document, and for a single query. A chunk or a sliding window would need a mask of
    tokens by tokens there, so it runs through FlexAttention with all visible blocks. Chunks give the same output as
    the whole prompt.

    Args:
        **guards: see :class:`~sparse_prefill.Strategy`. ``block_size`` matters for ``keep`` and ``block_mask``, and
            where FlexAttention runs; the others have no effect.
    """

    paper = "full causal attention"
    use = """
The baseline, and the strategy of layers and heads that must stay exact in a `Plan` or in `by_head`. Short prompts run
dense with every strategy; see `min_length`.
"""
    differs = "There is no released code: it is PyTorch's attention."
    chunk_invariant = True
    head_independent = True

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return scores

    def dense_reason(self, prompt: Prompt, device: str | torch.device = "cpu") -> str:
        return "strategy"

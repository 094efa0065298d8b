"""Attention sinks and a local window, the same for every head and prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.strategy import Strategy


@register_strategy("a_shape")
@dataclass(frozen=True, kw_only=True)
class AShape(Strategy):
    """Keep the first tokens and the nearest ones: nothing but the guards ``sink`` and ``local``.

    The cheapest pattern and the floor for the others: it can't see what lies between, so an answer in the middle of
    a prompt is lost. Both sizes are rounded out to whole blocks.

    Args:
        sink (int): first tokens that every query keeps. Default: 128.
        local (int): nearest keys that every query keeps. Default: 1024.
        **guards: see :class:`~sparse_prefill.Strategy`.
    """

    paper = "StreamingLLM, Xiao et al. 2023 (arXiv 2309.17453); as a prefill pattern: MInference (arXiv 2407.02490)"

    sink: int = 128
    local: int = 1024

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q.device)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return scores

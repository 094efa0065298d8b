"""Attention sinks and a local window, the same for every head and prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@register_strategy("a_shape")
@dataclass(frozen=True, kw_only=True)
class AShape(Strategy):
    """Keep the first tokens and the nearest ones, the same for every head and every prompt.

    It is made of the guards ``sink`` and ``local`` alone and estimates nothing. Most heads put most of their attention
    there; what stands between the first and the nearest tokens is lost to all of them.

    Both sizes are rounded out to whole blocks. Chunks, left padding and packed documents are served; each document has
    a sink of its own. A prompt that is prefilled in chunks of whole blocks selects what it selects in one piece.

    Args:
        sink (int): first tokens that every query keeps. Default: 128.
        local (int): nearest keys that every query keeps. Default: 1024.
        **guards: see :class:`~sparse_prefill.Strategy`.
    """

    paper = "StreamingLLM, Xiao et al. 2023 (arXiv 2309.17453); as a prefill pattern: MInference (arXiv 2407.02490)"
    reference = "microsoft/MInference@fb56c91: attn_type a_shape"
    use = """
The cheapest strategy, and the floor for the others: what looks at the prompt has to keep more of the attention than
this one does with as many blocks. Take it by itself for text whose context is near, never where an answer may stand in
the middle of the prompt. It serves single layers and heads well that are known to look nowhere else; see `Plan`,
`by_head`, `triangle_mix` and `duo_attention`.
"""
    differs = """
The window is cut at blocks, not at tokens: a query sees the whole block that its farthest near key lies in, and the
whole block of the last sink token. Positions aren't renumbered and nothing is evicted from the cache: it is the pattern
of the prefill alone.
"""
    chunk_invariant = True
    head_independent = True
    crossover = 2048
    crossover_of_gpu = 16384
    tunable: ClassVar[TunableOption | None] = TunableOption("local", 1, scale="tokens")

    sink: int = 128
    local: int = 1024

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q.device)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return scores

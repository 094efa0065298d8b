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

    It consists of the guards ``sink`` and ``local`` and estimates nothing. Most heads put most of their attention on
    these tokens. All heads lose the tokens between them.

    Both sizes are rounded out to whole blocks. Chunks, left padding and packed documents are served; each document has
    its own sink. A prompt in chunks of whole blocks selects the same blocks as in one piece.

    Args:
        sink (int): first tokens that every query keeps. Default: 128.
        local (int): nearest keys that every query keeps. Default: 1024.
        **guards: see :class:`~sparse_prefill.Strategy`.
    """

    paper = "StreamingLLM, Xiao et al. 2023 (arXiv 2309.17453); as a prefill pattern: MInference (arXiv 2407.02490)"
    reference = "microsoft/MInference@fb56c91: attn_type a_shape"
    use = """
The cheapest strategy, and the floor for the others: a method that looks at the prompt has to keep more of the attention
than this one at equal density. Take it for text whose context is near, never for prompts whose answer may lie in the
middle. It serves single layers and heads well that look nowhere else; see `Plan`, `by_head`, `triangle_mix` and
`duo_attention`.
"""
    differs = """
The window ends at blocks, not at tokens: a query sees the whole block of its farthest near key, and the whole block of
the last sink token. Positions aren't renumbered and nothing is evicted from the cache: only the prefill has this
pattern.
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

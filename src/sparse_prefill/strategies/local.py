"""The nearest tokens and nothing else, the same for every head and prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@register_strategy("local")
@dataclass(frozen=True, kw_only=True)
class Local(Strategy):
    """Keep the nearest tokens: nothing but the guard ``local``.

    A sliding window rounded out to whole blocks, without attention sinks. It never looks at the prompt. Tokens before
    the window reach a query only through the layers in between. A prompt in chunks of whole blocks selects the same
    blocks as in one piece.

    Args:
        local (int): nearest keys that every query keeps. Default: 1024.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "baseline of a sliding window, no paper"
    use = """
A baseline: the model without far keys and without sinks. Most heads attend strongly to the first tokens, which are
skipped here, so models that weren't trained with a window usually break. `a_shape` is the same with sinks. It also
serves inside wrappers, and for single heads that only look at near keys.
"""
    differs = "There is no released code: it is a plain window of whole blocks."
    chunk_invariant = True
    head_independent = True
    crossover = 2048
    tunable = TunableOption("local", 1, scale="tokens")

    local: int = 1024

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=q.device)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return scores

"""Sinks and every n-th block of a window, the same for every head and prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators import by_diagonal
from sparse_prefill.registry import register_strategy
from sparse_prefill.strategy import Strategy


@register_strategy("dilated")
@dataclass(frozen=True, kw_only=True)
class Dilated(Strategy):
    """Keep the first tokens, and within a window the blocks whose distance is a multiple of ``dilation``.

    A query block i keeps a key block j if (i - j) is a multiple of ``dilation`` and (i - j) * ``block_size`` is less
    than ``window``. The default dilation of 2 keeps half of the window's blocks. The defaults are the sizes of the
    MInference baseline; its second variant, a dense window of 2048 inside a dilated one, is ``local=2048,
    window=6144``. It never looks at the prompt. A prompt in chunks of whole blocks selects the same blocks as in one
    piece.

    Args:
        dilation (int): distance of the kept blocks, at least 1; 1 keeps the whole window. Default: 2.
        window (int): tokens that the window reaches back, at least 1. Default: 8192.
        sink (int): first tokens that every query keeps. Default: 1024.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "baseline of MInference, 2024 (arXiv 2407.02490)"
    reference = "microsoft/MInference@fb56c91: attn_type dilated1; microsoft/MInference@fb56c91: attn_type dilated2"
    use = """
A baseline with half the density of a window: a method that looks at the prompt has to beat it at equal density. All
heads of a layer skip the same blocks, so the layer loses their tokens.
"""
    differs = """
The released baseline keeps every second token, ours every second block. Sizes in tokens are the same.
"""
    chunk_invariant = True
    head_independent = True
    crossover = 2048

    dilation: int = 2
    window: int = 8192
    sink: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("dilation", self.dilation, least=1)
        check_tokens("window", self.window, least=1)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        distance = torch.arange(prompt.n_k, device=q.device)
        kept = (distance % self.dilation == 0) & (distance * prompt.block_size < self.window)
        return by_diagonal(kept.float()[None, None], prompt)  # [1, 1, n_q, n_k]

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return scores > 0

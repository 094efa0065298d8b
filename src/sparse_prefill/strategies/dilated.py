"""Sinks and every so-many-th block of a window, the same for every head and prompt."""

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

    Distances are counted in blocks, from the block of a query to that of a key, so that half the window's blocks are
    kept with a dilation of 2. The defaults are the sizes of the MInference baseline; those of its second variant, a
    dense window of 2048 inside a dilated one, are ``local=2048, window=6144``. It never looks at the prompt, and
    prompts in chunks of whole blocks select what they select in one piece.

    Args:
        dilation (int): distance of the kept blocks, at least 1; 1 keeps the whole window. Default: 2.
        window (int): tokens that the window reaches back, at least 1: a block is in it if the distance of the blocks
            comes to less than this. Default: 8192.
        sink (int): first tokens that every query keeps. Default: 1024.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "baseline of MInference, 2024 (arXiv 2407.02490)"
    reference = "microsoft/MInference@fb56c91: attn_type dilated1; microsoft/MInference@fb56c91: attn_type dilated2"
    use = """
A baseline of half the density of a window: a method that looks at the prompt has to beat it at equal density. What lies
in the skipped blocks is lost to a layer, since all of its heads skip the same ones.
"""
    differs = """
The released baseline keeps every second token; blocks of the grid can't be thinner than a block, so ours keeps every
second block. Sizes in tokens are the same.
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

"""Blocks by chance, the same for every head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_fraction, check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@register_strategy("random")
@dataclass(frozen=True, kw_only=True)
class Random(Strategy):
    """Keep each visible block with a probability of ``density``, and each row's own block.

    Whether a block is kept is a pure function of the seed and of the places of its query and key block, counted from
    the prompt's first block with a real token: the same on every device, for every head, layer and prompt. So padding
    by whole blocks shifts it, and prompts in chunks of whole blocks select what they select in one piece. A lower
    density keeps a part of what a higher one keeps.

    Args:
        density (float): probability of a block, in (0, 1]: the density to be expected, the own blocks aside.
            Default: 0.25.
        seed (int): which of the random tables, 0 or more; the lower 32 bits count. Default: 0.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "baseline of chance, no paper of its own"
    use = """
A baseline: set `density`, and the guards, to those of a method, and see what its choice of blocks is worth. Never to
serve a model.
"""
    differs = "There is no released code."
    chunk_invariant = True
    crossover = 2048
    tunable = TunableOption("density", 0.01, 1.0)

    density: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("density", self.density)
        check_tokens("seed", self.seed)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        size, device = prompt.block_size, q.device
        first = (prompt.start(device) // size)[:, None]  # [B, 1]
        rows = prompt.query_positions(device)[::size] // size - first  # [B, n_q]
        columns = torch.arange(prompt.n_k, device=device) - first  # [B, n_k]
        row_hash = _mix(_mix(torch.full_like(rows, self.seed & MASK)) ^ (rows & MASK))
        number = _mix(row_hash[:, :, None] ^ (columns & MASK)[:, None])
        # 24 bits are what fp32 holds exactly.
        return ((number >> 8).float() / 2**24)[:, None]  # in [0, 1), [B, 1, n_q, n_k]

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return scores >= 1 - self.density


MASK = 2**32 - 1


def _mix(x: Tensor) -> Tensor:
    """Scatter whole numbers of 32 bits, one to one; the factor is so small that no product leaves int64."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & MASK
    return x ^ (x >> 16)

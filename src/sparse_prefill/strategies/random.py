"""Random blocks, the same for every head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_fraction
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_strategy
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@register_strategy("random")
@dataclass(frozen=True, kw_only=True)
class Random(Strategy):
    """Keep each visible block with a probability of ``density``, and each row's own block.

    Whether a block is kept depends only on the seed and on the numbers of its query and key block, counted from the
    prompt's first block with a real token. It is the same on every device and for every head, layer and prompt. So
    padding by whole blocks shifts the table, and a prompt in chunks of whole blocks selects the same blocks as in one
    piece. A higher density keeps all blocks of a lower one, and more.

    Args:
        density (float): probability of a block, in (0, 1]: the expected density, own blocks aside. Default: 0.25.
        seed (int): which of the random tables, 0 or more; the lower 32 bits count. Default: 0.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "random baseline, no paper"
    use = """
A baseline: give it the density and the guards of a method, and see how much better the method's choice of blocks is.
Never serve a model with it.
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
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number, 0 or more, got {self.seed!r}.")

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
    """A one-to-one hash of 32-bit whole numbers; the factor is so small that no product exceeds int64."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & MASK
    return x ^ (x >> 16)

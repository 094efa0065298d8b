"""The functions that are compiled beside attention, with inputs for each."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_prefill.estimators import token_sums


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def logits(*shape: int) -> Tensor:
    x = 20 * random(*shape)
    x[..., -2:] = -torch.inf
    return x


def table(*shape: int) -> Tensor:
    return random(*shape) > 0.25


def masses(*shape: int) -> Tensor:
    return random(*shape).mul(3).exp().softmax(-1)


def token_sums_of(tokens: int, blocks: int, *, group: int) -> tuple:
    """Queries of a chunk after a prefix, and means of key blocks of 16 tokens up to its end."""
    rows = -(-tokens // 16) * 16
    stops = (16 * blocks - tokens + torch.arange(rows) + 1) // 16
    firsts = torch.where(torch.arange(rows) < tokens, 3, blocks)  # rows after the last query score nothing
    some, full = token_sums._tiles_scored(firsts, stops, torch.tensor([0, 128]), 16)
    return (
        3 * random(1, 4, tokens, 32).bfloat16(),
        random(1, 2, blocks, 32),
        torch.zeros(1, dtype=torch.int64),
        torch.arange(rows),
        torch.arange(256),
        firsts.int(),
        stops.int(),
        some[:, None],
        full[:, None],
        16,
        group,
        tuple(token_sums._tiles(32, 16).items()),
    )


def estimates() -> tuple[Tensor, ...]:
    """Estimates by means, columns and diagonals, and the visible blocks."""
    return masses(1, 4, 9, 40), masses(1, 4, 1, 40), masses(1, 4, 9, 40).flip(-1), table(1, 1, 9, 40)


STEPS: dict[str, tuple] = {  # by name: inputs
    "estimators.block_shares._peaks_and_sums": (logits(192), 16, 0.3),
    "estimators.block_shares._peaks_and_sums, of means": (logits(192), 8, 0.3),
    "estimators.token_sums._tiles_scored": (torch.arange(64) - 40, torch.arange(64) + 70, torch.tensor([0, 60]), 16),
    "estimators.token_sums._shares": token_sums_of(320, 200, group=1),
    "estimators.token_sums._shares, a chunk of groups": token_sums_of(150, 200, group=2),
    "estimators.proxy_heads._highest_probability": (logits(1, 2, 16, 32), 16),
    "estimators.proxy_heads._highest_probability, ragged": (logits(1, 1, 18, 20), 16),
    "estimators.pooled.softmax_among": (logits(1, 4, 9, 40), table(1, 1, 9, 40), 0.25),
    "estimators.representative._spread": (table(1, 4, 40), torch.arange(31, 40)),
    "estimators.spectral_bands._band": (random(1, 4, 9, 64), table(64)),
    "strategies.mean_slash._weights": (*estimates(), masses(1, 4, 9, 40).roll(7, -1)),
    "strategies.mean_slash._mixture": (*estimates(), masses(1, 4, 1, 1, 6).movedim(-1, 0)),
    "strategies.flex_prefill.jensen_shannon_distance": (masses(1, 4, 40), masses(1, 4, 40).flip(-1)),
    "selectors.cutoff.reaching": (masses(1, 4, 9, 40), torch.tensor([0.9]), None, 1, False),
    "selectors.cutoff.reaching, ties": (table(1, 4, 9, 40).float(), torch.tensor([0.6]), None, 1, False),
    "selectors.cutoff.reaching, forced": (masses(2, 4, 9, 40), torch.tensor([0.9]), table(1, 1, 9, 40), 1, False),
    "selectors.cutoff.reaching, of a head": (masses(1, 4, 9, 40), torch.tensor([[0.9]]), None, 2, False),
    "selectors.cutoff.reaching, within": (masses(1, 4, 9, 40), torch.tensor([[0.9]]), None, 2, True),
    "kernel.block_lists._in_lines_of_16": (table(6, 40),),
    "kernel.block_lists._in_lines_of_16, a few columns": (table(9, 2),),
    "kernel.block_lists._rows_listed": (table(24, 3), torch.arange(72).view(24, 3)),
}

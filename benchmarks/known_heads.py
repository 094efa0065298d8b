"""Synthetic queries, keys and values of heads whose kinds of attention are known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SEED = 0
KINDS = ("sink", "local", "vertical", "slash", "block")


def structured(
    tokens: int, heads: int, kv_heads: int, dim: int, *, dtype: torch.dtype, device: str, seed: int = SEED
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose heads attend in known ways, the kinds of ``KINDS`` in turn.

    A key is made of its position (waves of 24 frequencies, whose product with another position's falls with the
    distance), the topic of its segment (one of 16), a mark on the first 16 tokens, a mark on one token in 512, and
    noise. A query of a *sink* head looks for the first mark, of a *local* head for its own position, of a *vertical*
    head for the second mark, of a *slash* head for the position a fixed distance before it, and of a *block* head for
    its own segment's topic; each, more weakly, for the first mark and its own position as well.
    """
    generator = torch.Generator(device).manual_seed(seed)
    position = torch.arange(tokens, device=device)
    frequency = torch.logspace(0, -5, 24, device=device)
    topics = torch.randn(16, 32, generator=generator, device=device)
    topics = topics / topics.norm(dim=-1, keepdim=True)
    segment = torch.randint(16, (-(-tokens // 1024),), generator=generator, device=device).repeat_interleave(1024)
    of_segment = topics[segment[:tokens]]
    first = (position < 16).float()[:, None]
    marked = torch.zeros(tokens, 1, device=device)
    marked[torch.randint(tokens, (max(1, tokens // 512),), generator=generator, device=device)] = 1

    def wave(at: Tensor) -> Tensor:
        angle = at[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], -1) / 24**0.5  # [tokens, 48]

    noise = dim - 48 - 32 - 2
    # A full match has a logit of 12 at 4K tokens, and of as much more at more tokens as keeps its share among them: a
    # fixed one would drown. The share of the blocks that an oracle needs for a recall of 0.95, 0.27 at 4K and 0.11 at
    # 16K tokens, then falls as in layers 0, 6, 12 and 18 of Qwen2.5-Coder-0.5B, which need 0.26 and 0.12. Every third
    # layer, as all of them, needs more: 0.32 and 0.20.
    sharp = (12 + math.log(tokens / 4096)) * dim**0.5
    weights = {  # of sinks, own position, marks, position before, topic
        "sink": (1.0, 0.5, 0.0, 0.0, 0.0),
        "local": (0.5, 1.3, 0.0, 0.0, 0.0),
        "vertical": (0.7, 0.7, 1.0, 0.0, 0.0),
        "slash": (0.6, 0.4, 0.0, 1.3, 0.0),
        "block": (0.6, 0.5, 0.0, 0.0, 1.0),
    }
    q = torch.empty(1, heads, tokens, dim, dtype=dtype, device=device)
    k = torch.empty(1, kv_heads, tokens, dim, dtype=dtype, device=device)
    for head in range(kv_heads):
        parts = (wave(position), of_segment, first, marked)
        k[0, head] = torch.cat([*parts, randn(tokens, noise, generator, device)], -1)
    for head in range(heads):
        sink, near, mark, before, topic = weights[KINDS[head % len(KINDS)]]
        distance = 100 + 331 * head
        at = near * wave(position) + (before * wave(position - distance) if before else 0)
        parts = (at, topic * of_segment, torch.full_like(first, sink), torch.full_like(first, mark))
        q[0, head] = sharp * torch.cat([*parts, 0.02 * randn(tokens, noise, generator, device)], -1)
    v = torch.randn(1, kv_heads, tokens, dim, generator=generator, device=device).to(dtype)
    return q, k, v


def randn(rows: int, columns: int, generator: torch.Generator, device: str) -> Tensor:
    return torch.randn(rows, columns, generator=generator, device=device)

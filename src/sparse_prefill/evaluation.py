"""How much a keep table costs and how much of the true attention it holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_prefill.estimators import TrueMass
from sparse_prefill.prompt import Prompt


def density(keep: Tensor, prompt: Prompt) -> Tensor:
    """Share of the visible blocks that a table keeps; dense attention has 1.

    Args:
        keep (Tensor): bool [B or 1, H or 1, n_q, n_k].
        prompt (Prompt): what the tokens are.

    Returns:
        Tensor: fp32 [B or 1, H or 1].
    """
    visible = prompt.visible(keep.device)
    return (keep & visible).sum((-2, -1)) / visible.sum((-2, -1))


def true_mass(q: Tensor, k: Tensor, prompt: Prompt, query_blocks: Sequence[int]) -> Tensor:
    """True attention mass of some query blocks.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        prompt (Prompt): what the tokens are.
        query_blocks (Sequence[int]): which query blocks, each in [0, n_q).

    Returns:
        Tensor: fp32 [B, Hq, len(query_blocks), n_k]; each row sums to 1, those of padding to 0.

    Raises:
        ValueError: if a block is out of range.
    """
    outside = [i for i in query_blocks if not 0 <= i < prompt.n_q]
    if outside or not query_blocks:
        raise ValueError(f"query_blocks must be some of 0 to {prompt.n_q - 1}, got {list(query_blocks)}.")
    estimator = TrueMass()
    return torch.cat([estimator.rows(q, k, prompt, range(i, i + 1)) for i in query_blocks], dim=2)


def recall(mass: Tensor, keep: Tensor, query_blocks: Sequence[int]) -> Tensor:
    """Share of the true attention that a table keeps.

    Args:
        mass (Tensor): from :func:`true_mass`, fp32 [B, Hq, len(query_blocks), n_k].
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k].
        query_blocks (Sequence[int]): the query blocks of ``mass``.

    Returns:
        Tensor: fp32 [B, Hq, len(query_blocks)].
    """
    kept = keep[:, :, torch.as_tensor(query_blocks, device=keep.device)]
    return (mass * kept).sum(-1) / mass.sum(-1).clamp(min=torch.finfo(mass.dtype).tiny)


def oracle_density(mass: Tensor, share: float, prompt: Prompt, query_blocks: Sequence[int]) -> float:
    """The least density at which any table could hold ``share`` of the mass, on average over heads and query blocks.

    Args:
        mass (Tensor): from :func:`true_mass`, fp32 [B, Hq, len(query_blocks), n_k].
        share (float): recall to reach.
        prompt (Prompt): what the tokens are.
        query_blocks (Sequence[int]): the query blocks of ``mass``.

    Returns:
        float: blocks needed over blocks visible.
    """
    ranked = mass.flatten().sort(descending=True).values.double().cumsum(0)
    needed = int((ranked < share * ranked[-1]).sum()) + 1
    visible = prompt.visible(mass.device)[:, :, torch.as_tensor(query_blocks, device=mass.device)]
    return needed / int(visible.expand(*mass.shape).sum())

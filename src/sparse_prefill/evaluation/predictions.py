"""Predictions of a model, compared with its predictions under dense attention."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor


def kl_divergence(dense: Tensor, sparse: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the dense model's distribution of a token to the sparse one's, in nats.

    Args:
        dense (Tensor): log-probabilities [..., v] with dense attention.
        sparse (Tensor): those with sparse attention, of the same shape.

    Returns:
        Tensor: [...], at least 0; infinite where the sparse model rules out a token that the dense one doesn't.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shapes(dense, sparse)
    possible = dense > -math.inf
    terms = torch.where(possible, dense.exp() * (dense - sparse), 0.0)
    return terms.sum(-1).clamp(min=0)  # rounding may give less than 0 for equal distributions


def perplexity_ratio(dense: Tensor, sparse: Tensor, last: float = 1.0) -> float:
    """Perplexity with sparse attention over that with dense attention.

    Most blocks are skipped late in a prompt, so errors show there first: compare the whole text with its end.

    Args:
        dense (Tensor): negative log-likelihoods of the tokens with dense attention, in nats, [..., tokens].
        sparse (Tensor): those with sparse attention, of the same shape.
        last (float): share of the tokens at the end of the text to compare, in (0, 1]: 0.25 for its last quarter.
            Default: 1.0, i.e. all.

    Returns:
        float: 1 if nothing is lost; infinite if the sparse model rules out a token.

    Raises:
        ValueError: if the shapes differ, there are no tokens, a loss is NaN, or the share is out of range.
    """
    _check_shapes(dense, sparse)
    if not dense.numel():
        raise ValueError("perplexity_ratio needs at least one token, got none.")
    if not 0 < last <= 1:
        raise ValueError(f"last must lie in (0, 1], got {last!r}.")
    count = math.ceil(round(last * dense.shape[-1], 9))
    loss = float((sparse.double() - dense.double())[..., -count:].mean())
    if math.isnan(loss):
        raise ValueError("perplexity_ratio needs numbers, and a negative log-likelihood is NaN, or infinite in both.")
    return math.exp(loss) if loss < math.log(sys.float_info.max) else math.inf


def _check_shapes(dense: Tensor, sparse: Tensor) -> None:
    if dense.shape != sparse.shape:
        raise ValueError(f"Compare predictions of the same tokens, got {list(dense.shape)} and {list(sparse.shape)}.")

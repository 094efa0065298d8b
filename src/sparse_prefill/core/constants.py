"""Tensors of Python numbers, made without a copy from the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of numbers, most of which equal the first one.

    It is made by fills, one for each other number: a copy from the host would wait for a GPU.
    """
    made = torch.full((len(values),), values[0], dtype=dtype, device=device)
    for i, value in enumerate(values):
        if value != values[0]:
            made[i] = value
    return made

"""Tensors of Python numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of numbers, most of which equal the first, made by fills: a copy from the host waits for the GPU."""
    made = torch.full((len(values),), values[0], dtype=dtype, device=device)
    for i, value in enumerate(values):
        if value != values[0]:
            made[i] = value
    return made

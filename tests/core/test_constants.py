"""Vectors of Python numbers."""

from __future__ import annotations

import pytest
import torch

from sparse_prefill.core.constants import constants


@pytest.mark.parametrize("values", [[3], [1, 1, 1], [0.5, 0.25, 0.5, 2.0]])
def test_a_vector_holds_the_numbers_in_order(values):
    found = constants(values, torch.float32, torch.device("cpu"))
    assert (found.dtype, found.tolist()) == (torch.float32, values)

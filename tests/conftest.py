"""Settings that all tests share."""

import pytest
import torch
from hypothesis import settings

# The same few examples in every run: a new shape may mean a new compiled kernel, which takes seconds.
settings.register_profile("few", max_examples=15, deadline=None, derandomize=True, database=None)
settings.load_profile("few")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

"""Settings that all tests share."""

import os

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes
    torch.set_num_threads(1)

# The same few examples in every run: a new shape may compile a new kernel, which takes seconds.
settings.register_profile("few", max_examples=15, deadline=None, derandomize=True, database=None)
settings.load_profile("few")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

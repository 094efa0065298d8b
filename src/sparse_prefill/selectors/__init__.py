"""Selectors: choose the blocks to keep from their scores."""

from sparse_prefill.selectors.cumulative import CumulativeMass
from sparse_prefill.selectors.max_relative import MaxRelative
from sparse_prefill.selectors.threshold import Threshold
from sparse_prefill.selectors.top_k import TopK, top_k

__all__ = ["CumulativeMass", "MaxRelative", "Threshold", "TopK", "top_k"]

"""Measures of sparse attention: density, recall, the oracle's density, output error, and changes in predictions.

They are computed exactly over chosen query blocks, one query block at a time, so that long prompts fit into memory: 32K
tokens of 9 query heads take less than 1 GB.
"""

from sparse_prefill.estimators.true_mass import true_mass
from sparse_prefill.evaluation.blocks import (
    density,
    oracle_density,
    oracle_density_by_head,
    oracle_gap,
    overlap,
    overlap_by_head,
    recall,
    spread_blocks,
    worst,
)
from sparse_prefill.evaluation.collector import Collector
from sparse_prefill.evaluation.outputs import output_error, squared_error
from sparse_prefill.evaluation.predictions import kl_divergence, perplexity_ratio

__all__ = [
    "Collector",
    "density",
    "kl_divergence",
    "oracle_density",
    "oracle_density_by_head",
    "oracle_gap",
    "output_error",
    "overlap",
    "overlap_by_head",
    "perplexity_ratio",
    "recall",
    "spread_blocks",
    "squared_error",
    "true_mass",
    "worst",
]

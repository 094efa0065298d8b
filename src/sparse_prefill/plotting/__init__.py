"""Pictures of measurements as matplotlib figures. Needs the ``plot`` extra."""

from sparse_prefill.plotting.frontier import frontier
from sparse_prefill.plotting.heads import density_map, head_map, recall_map
from sparse_prefill.plotting.needles import needle_grid
from sparse_prefill.plotting.speed import crossover, speedup

__all__ = ["crossover", "density_map", "frontier", "head_map", "needle_grid", "recall_map", "speedup"]

"""The earlier path of names that are now in ``sparse_prefill.models.transformers.stats``."""

from sparse_prefill.models.transformers.stats import LayerStats, Stats

__all__ = ["LayerStats", "Stats"]

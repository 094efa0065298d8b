"""The earlier path of names that are now in ``sparse_prefill.evaluation.roofline``."""

from sparse_prefill.evaluation.roofline import Work, kernel_work, least_work

__all__ = ["Work", "kernel_work", "least_work"]

"""An evaluation as one HTML file that needs nothing else. Needs the ``plot`` extra."""

from sparse_prefill.report.page import write_report

__all__ = ["write_report"]

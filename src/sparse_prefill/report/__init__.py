"""An evaluation as pictures and as one self-contained HTML file. Needs the ``plot`` extra."""

from sparse_prefill.report.figures import Picture, figures_of
from sparse_prefill.report.page import write_report

__all__ = ["Picture", "figures_of", "write_report"]

"""Find, for one model, how much each layer and head has to keep."""

from sparse_prefill.calibration.calibrate import (
    Calibration,
    Curve,
    Curves,
    Fitted,
    as_plan,
    calibrate,
    knob_of,
    measure,
)
from sparse_prefill.calibration.head_tables import estimate_head_table
from sparse_prefill.calibration.observe import Sight, observe
from sparse_prefill.calibration.pattern_search import SHAPES, search_patterns
from sparse_prefill.calibration.verification import Verification, verify

__all__ = [
    "SHAPES",
    "Calibration",
    "Curve",
    "Curves",
    "Fitted",
    "Sight",
    "Verification",
    "as_plan",
    "calibrate",
    "estimate_head_table",
    "knob_of",
    "measure",
    "observe",
    "search_patterns",
    "verify",
]

"""Calibration: the density that each layer and head of one model needs for a recall."""

from sparse_prefill.calibration.calibrate import calibrate
from sparse_prefill.calibration.curves import Curve, Curves, measure
from sparse_prefill.calibration.length_law import LengthError, LengthLaw, fit_length_law, length_error
from sparse_prefill.calibration.pattern_search import SHAPES, search_patterns
from sparse_prefill.calibration.result import Calibration, Fitted, as_plan
from sparse_prefill.calibration.tunable import tunable_option_of, tunable_options
from sparse_prefill.calibration.verification import Verification, verify
from sparse_prefill.evaluation.head_tables import estimate_head_table
from sparse_prefill.models.eval_model import LayerInputs
from sparse_prefill.models.observe import observe

knob_of, with_knob = tunable_option_of, tunable_options  # former names

__all__ = [
    "SHAPES",
    "Calibration",
    "Curve",
    "Curves",
    "Fitted",
    "LayerInputs",
    "LengthError",
    "LengthLaw",
    "Verification",
    "as_plan",
    "calibrate",
    "estimate_head_table",
    "fit_length_law",
    "length_error",
    "measure",
    "observe",
    "search_patterns",
    "tunable_option_of",
    "tunable_options",
    "verify",
]

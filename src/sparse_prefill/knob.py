"""Former name of :mod:`sparse_prefill.tunable_option`."""

from sparse_prefill.tunable_option import TunableOption as Knob

__all__ = ["Knob"]

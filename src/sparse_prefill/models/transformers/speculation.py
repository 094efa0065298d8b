"""How many tokens of a forward are guesses of assisted decoding."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn
from transformers import GenerationMixin

# Code of a forward that verifies guesses: assisted decoding, which calls its model.
ASSISTED_DECODING, MODULE_CALL = GenerationMixin._assisted_decoding.__code__, nn.Module.__call__.__code__
NUM_GUESSES = "candidate_length"  # the local variable of assisted decoding that counts its guesses


def num_guessed_tokens() -> int:
    """Guesses at the end of the tokens that the running forward takes; 0 outside assisted decoding.

    transformers passes the guesses as plain tokens and hands their number to neither the model nor the mask function.
    Only a local variable of ``GenerationMixin._assisted_decoding`` holds it, so it is read from that call's frame.

    Raises:
        RuntimeError: if this release of transformers has no such variable.
    """
    frame: FrameType | None = sys._getframe()
    callee = None
    while frame is not None and frame.f_code is not ASSISTED_DECODING:
        frame, callee = frame.f_back, frame
    # Assisted decoding also runs the assistant, and may change likelihoods by a forward; neither verifies guesses.
    if frame is None or callee is None or callee.f_code is not MODULE_CALL:
        return 0
    if NUM_GUESSES not in frame.f_locals:
        raise RuntimeError(
            f"Assisted decoding of this release of transformers has no variable {NUM_GUESSES!r}, so the number of "
            "guessed tokens is unknown: generate without speculation, or install transformers 5.23."
        )
    return frame.f_locals[NUM_GUESSES]

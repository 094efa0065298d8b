"""Sparse prefill for torchtune's decoders: prefill, generation and scoring."""

from sparse_prefill.models.torchtune.decoder import (
    Generation,
    LastTokenDecoder,
    Likelihood,
    Score,
    generate,
    generate_packed,
    likelihood,
    prefill,
    prefill_packed,
    score,
    sparsify,
)

__all__ = [
    "Generation",
    "LastTokenDecoder",
    "Likelihood",
    "Score",
    "generate",
    "generate_packed",
    "likelihood",
    "prefill",
    "prefill_packed",
    "score",
    "sparsify",
]

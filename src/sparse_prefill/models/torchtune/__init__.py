"""Sparse prefill for torchtune's decoders: prefill, generation and scoring."""

from sparse_prefill.models.torchtune.decoder import LastTokenDecoder, sparsify
from sparse_prefill.models.torchtune.generation import Generation, generate, generate_packed
from sparse_prefill.models.torchtune.prefilling import prefill, prefill_packed
from sparse_prefill.models.torchtune.scoring import Likelihood, Score, likelihood, score

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

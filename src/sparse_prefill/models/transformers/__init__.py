"""Sparse prefill for the decoders of Hugging Face transformers."""

from sparse_prefill.models.transformers.switch import register, sparse

__all__ = [
    "register",
    "sparse",
]

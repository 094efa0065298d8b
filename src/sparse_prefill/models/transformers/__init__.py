"""Sparse prefill for the decoders of Hugging Face transformers."""

from sparse_prefill.models.transformers.attention import register
from sparse_prefill.models.transformers.switch import sparse

__all__ = [
    "register",
    "sparse",
]

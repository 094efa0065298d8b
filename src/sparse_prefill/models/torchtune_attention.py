"""The earlier path of names that are now in ``sparse_prefill.models.torchtune.attention``."""

from sparse_prefill.models.torchtune.attention import SparsePrefillAttention, SparsePrefillGemma2Attention

__all__ = ["SparsePrefillAttention", "SparsePrefillGemma2Attention"]

"""GGUF files: their weights for torchtune's decoders, and their tokenizers."""

from sparse_prefill.models.gguf.decoder import GGUFCheckpointer, gguf_decoder

__all__ = [
    "GGUFCheckpointer",
    "gguf_decoder",
]

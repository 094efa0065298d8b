"""The earlier path of names that are now in ``sparse_prefill.models.gguf.tokenizer``."""

from sparse_prefill.models.gguf.tokenizer import GGUFTokenizer

__all__ = ["GGUFTokenizer"]

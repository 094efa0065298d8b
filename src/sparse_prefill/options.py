"""The earlier path of names that are now in ``sparse_prefill.core.option_checks``."""

from sparse_prefill.core.option_checks import check_tokens

__all__ = ["check_tokens"]

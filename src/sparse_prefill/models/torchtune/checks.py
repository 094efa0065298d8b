"""Checks of what prefill, generation and scoring are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.models.torchtune.decoder import LastTokenDecoder

Padding = Tensor | Sequence[int]


def check_inputs(model: LastTokenDecoder, tokens: Tensor) -> None:
    """Refuse models without sparse prefill, and tokens that are not ids [b, s]."""
    if not isinstance(model, LastTokenDecoder):
        raise ValueError(f"The model is a {type(model).__name__}: give it sparse prefill with sparsify() first.")
    if tokens.ndim != 2 or tokens.is_floating_point() or 0 in tokens.shape:
        raise ValueError(f"tokens must be whole numbers [batch, tokens], got {tokens.dtype} {list(tokens.shape)}.")


def check_length(model: LastTokenDecoder, length: int) -> None:
    """Refuse prompts that are longer than the model's ``max_seq_len``."""
    if length > model.max_seq_len:
        raise ValueError(f"The model takes {model.max_seq_len} tokens, got {length}: shorten the prompt.")


def check_new_tokens(model: LastTokenDecoder, length: int, max_new_tokens: int) -> None:
    """Refuse a number of new tokens that does not fit into the model after a prompt of ``length`` tokens."""
    check_tokens("max_new_tokens", max_new_tokens, least=1)
    if length + max_new_tokens > model.max_seq_len:
        raise ValueError(
            f"A prompt of {length} tokens and {max_new_tokens} new ones don't fit into the model's "
            f"{model.max_seq_len}: shorten the prompt or ask for fewer."
        )


def padding_tensor(left_padding: Padding | None, batch: int, length: int | None = None) -> Tensor | None:
    """The padding of each row as a tensor [b] on the CPU, checked.

    Args:
        left_padding (Tensor | Sequence[int] | None): padding tokens in front of each row.
        batch (int): rows.
        length (int | None): each row must keep a token among its first ``length``. Default: not checked.

    Returns:
        Tensor | None: the padding; None if there is none.

    Raises:
        ValueError: if the padding is not one whole number of 0 or more for each row, or leaves a row without tokens.
    """
    if left_padding is None:
        return None
    padding = torch.as_tensor(left_padding).cpu()
    if padding.shape != (batch,) or padding.is_floating_point() or padding.dtype == torch.bool:
        raise ValueError(
            f"left_padding must be {batch} whole numbers, one for each row of tokens, got {padding.dtype} of shape "
            f"{list(padding.shape)}."
        )
    if bool((padding < 0).any()):
        raise ValueError(f"left_padding must be 0 or more in each row, got {padding.tolist()}.")
    if length is not None and bool((padding >= length).any()):
        raise ValueError(f"left_padding must leave each row a token of its {length}, got {padding.tolist()}.")
    return padding

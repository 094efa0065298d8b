"""Lengths, padding, documents and window of a prompt: the value that all rules of attention are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import as_int, check_block_size, check_tokens
from sparse_prefill.core.prompt_cache import PromptCache


@dataclass(frozen=True, eq=False)
class PromptShape:
    """Base of :class:`~sparse_prefill.Prompt`: what the prompt is, without the rules that follow from it.

    Args and errors are those of :class:`~sparse_prefill.Prompt`.

    Attributes:
        cache (PromptCache): tables that were computed from this shape, shared by the layers of a model.
    """

    q_len: int
    kv_len: int = None  # type: ignore[assignment]  # an int once built
    block_size: int = 128
    left_padding: Tensor | Sequence[int] | None = None  # a Tensor or None once built, as are the two below
    documents: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None
    total_len: int | None = None
    right_padding: Tensor | Sequence[int] | None = None
    window: int | None = None
    cache: PromptCache = field(default_factory=PromptCache, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.kv_len is None:
            object.__setattr__(self, "kv_len", self.q_len)
        for name in ("q_len", "kv_len", "block_size", "total_len", "window"):
            object.__setattr__(self, name, as_int(getattr(self, name)))
        check_tokens("q_len", self.q_len, least=1)
        check_tokens("kv_len", self.kv_len, least=1)
        if self.q_len > self.kv_len:
            raise ValueError(
                f"q_len must not exceed kv_len, got q_len={self.q_len} and kv_len={self.kv_len}: queries are the "
                "last tokens of the keys, so pass the keys of the whole prefix along."
            )
        if self.total_len is not None:
            check_tokens("total_len", self.total_len, least=self.kv_len)
        check_block_size(self.block_size)
        if self.documents is not None and (self.left_padding is not None or self.right_padding is not None):
            raise ValueError("Give padding or documents, not both: make the padding a separate document.")
        for name in ("left_padding", "right_padding"):
            object.__setattr__(self, name, _checked_padding(name, getattr(self, name), self.kv_len))
        _check_padding_sum(self.left_padding, self.right_padding, self.kv_len)
        object.__setattr__(self, "documents", _checked_documents(self.documents, self.kv_len))
        if self.window is not None:
            check_tokens("window", self.window, least=1)
            if self.window >= self.kv_len:  # it hides nothing
                object.__setattr__(self, "window", None)

    @property
    def offset(self) -> int:
        """Position of the first query row, in tokens."""
        return self.kv_len - self.q_len

    @property
    def n_q(self) -> int:
        """Number of query blocks."""
        return -(-self.q_len // self.block_size)

    @property
    def n_k(self) -> int:
        """Number of key blocks."""
        return -(-self.kv_len // self.block_size)

    @property
    def batch(self) -> int:
        """Batch size of the padding or the documents; 1 if any batch fits."""
        for rows in (self.left_padding, self.right_padding, self.documents):
            if rows is not None:
                return len(rows)
        return 1

    @property
    def whole_len(self) -> int:
        """Number of tokens of the whole prompt that this one is a chunk of; ``kv_len`` if ``total_len`` isn't given."""
        return self.kv_len if self.total_len is None else self.total_len

    @property
    def is_causal(self) -> bool:
        """Whether causality is the only rule: no padding, no documents and no window."""
        return self.is_single and self.window is None

    @property
    def is_single(self) -> bool:
        """Whether each row of the batch is one prompt from its first token to its last: no padding, no documents."""
        return self.left_padding is None and self.right_padding is None and self.documents is None


def _checked_padding(name: str, given: object, kv_len: int) -> Tensor | None:
    """The padding of one side as int64 [B], or None if there is none."""
    if given is None:
        return None
    padding = torch.as_tensor(given)
    if padding.ndim != 1 or padding.is_floating_point() or padding.dtype == torch.bool:
        place = "before" if name == "left_padding" else "after"
        raise ValueError(
            f"{name} must be whole numbers of shape [B], got shape {list(padding.shape)} and "
            f"dtype {padding.dtype}: give the number of padding tokens {place} each prompt."
        )
    if bool(((padding < 0) | (padding > kv_len)).any()):
        raise ValueError(f"{name} must lie in [0, kv_len={kv_len}], got {padding.tolist()}.")
    return padding.long() if bool(padding.any()) else None


def _check_padding_sum(left: object, right: object, kv_len: int) -> None:
    if left is None or right is None:
        return
    left, right = cast(Tensor, left), cast(Tensor, right)
    if len(left) != len(right) or bool((left + right > kv_len).any()):
        raise ValueError(
            f"left_padding and right_padding must be of one batch and together at most kv_len={kv_len}, got "
            f"{left.tolist()} and {right.tolist()}."
        )


def _checked_documents(given: object, kv_len: int) -> Tensor | None:
    """The documents as int64 [B, kv_len], or None if there is one only."""
    if given is None:
        return None
    documents = torch.as_tensor(given)
    documents = documents[None] if documents.ndim == 1 else documents
    if documents.ndim != 2 or documents.shape[1] != kv_len or documents.is_floating_point():
        raise ValueError(
            f"documents must be whole numbers of shape [kv_len] or [B, kv_len] with kv_len={kv_len}, "
            f"got shape {list(documents.shape)} and dtype {documents.dtype}."
        )
    if bool((documents.diff(dim=1) < 0).any()):
        raise ValueError("documents must not decrease along the tokens: number the documents in their order.")
    return documents.long() if bool((documents != documents[:, :1]).any()) else None

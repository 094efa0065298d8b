"""Packing of many prompts into few rows for prefill, and unpacking of the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Packed:
    """Prompts packed into rows by :func:`pack`.

    Notation used for tensor shapes:
        P: prompts, in the given order; R: rows; W: tokens of the fullest row.

    Args:
        tokens (Tensor): token ids [R, W]; each row is padded after its last prompt.
        documents (Tensor): number of each token's prompt within its row, int64 [R, W]. Padding is a separate document.
        positions (Tensor): position of each token within its prompt, int64 [R, W], for rotary embeddings.
        rows (Tensor): row of each prompt, int64 [P].
        starts (Tensor): first token of each prompt within its row, int64 [P].
        lengths (Tensor): tokens of each prompt, int64 [P].
    """

    tokens: Tensor
    documents: Tensor
    positions: Tensor
    rows: Tensor
    starts: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.lengths)

    @property
    def left_padding(self) -> Tensor:
        """Padding before each prompt if :meth:`unpack_cache` pads on the left: int64 [P]."""
        return self.lengths.max() - self.lengths

    def prompt(self, block_size: int = 128) -> Prompt:
        """The rows as a prompt for :func:`~sparse_prefill.sparse_attention`, with a document for each packed prompt."""
        return Prompt(self.tokens.shape[1], block_size=block_size, documents=self.documents)

    def unpack(self, x: Tensor) -> list[Tensor]:
        """The entries of each prompt, e.g. of hidden states or logits.

        Args:
            x (Tensor): one entry per token [R, W, ...].

        Returns:
            list[Tensor]: P views [tokens of the prompt, ...].

        Raises:
            ValueError: if the shape of ``x`` doesn't fit these rows.
        """
        self._check(x, tokens_at=1)
        places = zip(self.rows.tolist(), self.starts.tolist(), self.lengths.tolist(), strict=True)
        return [x[row, start : start + length] for row, start, length in places]

    def last(self, x: Tensor) -> Tensor:
        """The entry of each prompt's last token, which predicts its first new token.

        Args:
            x (Tensor): one entry per token [R, W, ...].

        Returns:
            Tensor: [P, ...].

        Raises:
            ValueError: if the shape of ``x`` doesn't fit these rows.
        """
        self._check(x, tokens_at=1)
        return x[self.rows.to(x.device), (self.starts + self.lengths - 1).to(x.device)]

    def unpack_cache(self, x: Tensor, padding_side: Side = "left") -> Tensor:
        """Keys or values of the rows as a padded batch, for decoding all prompts together.

        Args:
            x (Tensor): cached keys or values of one layer [R, H, W or more, D].
            padding_side (str): "left" aligns the ends of the prompts, so that their new tokens share a slot; "right"
                aligns their beginnings. Default: "left".

        Returns:
            Tensor: [P, H, longest prompt, D], 0 in padding.

        Raises:
            ValueError: if the shape of ``x`` doesn't fit these rows, or the side is unknown.
        """
        self._check(x, tokens_at=2)
        if padding_side not in get_args(Side):
            raise ValueError(f"padding_side must be one of {', '.join(get_args(Side))}, got {padding_side!r}.")
        longest = int(self.lengths.max())
        position = torch.arange(longest) - (self.left_padding[:, None] if padding_side == "left" else 0)
        real = (position >= 0) & (position < self.lengths[:, None])  # [P, longest]
        token = torch.where(real, self.starts[:, None] + position, 0).to(x.device)
        found = x[self.rows[:, None].to(x.device), :, token]  # [P, longest, H, D]
        return found.masked_fill(~real[:, :, None, None].to(x.device), 0).transpose(1, 2)

    def _check(self, x: Tensor, tokens_at: int) -> None:
        rows, width = self.tokens.shape
        if x.ndim <= tokens_at or x.shape[0] != rows or x.shape[tokens_at] < width:
            raise ValueError(
                f"Expected {rows} packed rows with {width} tokens in dimension {tokens_at}, got shape {list(x.shape)}."
            )


def pack(prompts: Sequence[Tensor | Sequence[int]], *, capacity: int | None = None, pad_id: int = 0) -> Packed:
    """Pack prompts into few rows by first-fit decreasing (Prepacking, arXiv 2404.09529).

    A padded batch computes the length of its longest prompt for every prompt. Packed, several short prompts share a
    row, as documents that don't attend to each other. The rows depend on the prompts, but not on their order.

    Args:
        prompts (Sequence[Tensor | Sequence[int]]): token ids of each prompt, [1 or more].
        capacity (int | None): maximum number of tokens in a row. Default: the length of the longest prompt.
        pad_id (int): token id of padding. Default: 0.

    Returns:
        Packed: the rows, and the place of each prompt. Token ids are on the device of the first prompt, all other
            tensors on the CPU.

    Raises:
        ValueError: if there is no prompt, or if a prompt is empty, isn't a list of token ids, or is longer than
            ``capacity``.

    Example:
        >>> packed = pack([[11, 12, 13, 14], [21], [31, 32, 33]])
        >>> packed.tokens.tolist()
        [[11, 12, 13, 14], [31, 32, 33, 21]]
    """
    ids = [_token_ids(i, prompt) for i, prompt in enumerate(prompts)]
    if not ids:
        raise ValueError("There is nothing to pack: give one prompt or more.")
    longest = max(map(len, ids))
    if capacity is None:
        capacity = longest
    check_tokens("capacity", capacity, least=1)
    if longest > capacity:
        raise ValueError(f"A prompt has {longest} tokens and a row holds {capacity}: raise the capacity or shorten it.")

    filled, rows, starts, numbers = _first_fit(ids, capacity)
    tokens = torch.full((len(filled), max(filled)), pad_id, dtype=torch.int64, device=ids[0].device)
    documents = torch.full(tokens.shape, len(ids))  # the number of padding; prompts overwrite it
    positions = torch.arange(tokens.shape[1]).repeat(len(filled), 1)
    for one, row, start, number in zip(ids, rows, starts, numbers, strict=True):
        place = slice(start, start + len(one))
        tokens[row, place] = one.to(tokens.device)
        documents[row, place] = number
        positions[row, place] = torch.arange(len(one))
    for row, length in enumerate(filled):
        positions[row, length:] -= length
    places = (torch.tensor(values) for values in (rows, starts, [len(one) for one in ids]))
    return Packed(tokens, documents, positions, *places)


def _token_ids(i: int, prompt: Tensor | Sequence[int]) -> Tensor:
    ids = torch.as_tensor(prompt)
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"Prompt {i} must be token ids [1 or more], got shape {list(ids.shape)} and dtype {ids.dtype}."
        )
    return ids.long()


def _first_fit(ids: list[Tensor], capacity: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Tokens in each row; and for each prompt its row, its first token in the row and its number in the row."""
    filled: list[int] = []
    held: list[int] = []
    rows, starts, numbers = ([0] * len(ids) for _ in range(3))
    # Prompts of equal length are sorted by their tokens, so that another order of the prompts gives the same rows.
    for i in sorted(range(len(ids)), key=lambda i: (-len(ids[i]), ids[i].tolist())):
        row = next((r for r, length in enumerate(filled) if length + len(ids[i]) <= capacity), len(filled))
        if row == len(filled):
            filled.append(0)
            held.append(0)
        rows[i], starts[i], numbers[i] = row, filled[row], held[row]
        filled[row] += len(ids[i])
        held[row] += 1
    return filled, rows, starts, numbers

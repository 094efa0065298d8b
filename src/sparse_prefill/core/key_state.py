"""Statistics of the keys of earlier chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class KeyState:
    """Statistics of key blocks, such as their means, kept from one chunk of a prompt to the next.

    Each layer needs its own object. Keep it with the layer's KV cache, and drop it with the cache: a prompt that begins
    at its first token resets it, but it can't detect that a cached prefix was replaced by another one. It holds a few
    numbers for each complete block. The means of 128K tokens with 8 key heads of 128 dimensions take 4 MB in blocks of
    128.

    Example:
        >>> state = KeyState()
        >>> for end in range(1024, 8193, 1024):
        ...     chunk = q[:, :, end - 1024 : end]
        ...     out = sparse_attention(chunk, k[:, :, :end], v[:, :, :end], "flash_prefill", state=state)
    """

    def __init__(self) -> None:
        self._blocks: dict[Hashable, Tensor] = {}
        self._parts: dict[Hashable, KeyState] = {}
        self._earlier = self._blocks
        self._of_call: dict[Hashable, tuple[Tensor, Tensor]] | None = None  # the tensor, and its statistic
        self._parts_of_call: dict[Hashable, KeyState] = {}

    def for_call(self) -> KeyState:
        """This state for one call of attention, in which no statistic of a tensor is computed twice."""
        state = copy.copy(self)  # shares the blocks
        state._earlier, state._of_call, state._parts_of_call = dict(self._blocks), {}, {}
        return state

    def part(self, key: Hashable) -> KeyState:
        """The state of a part of the layer: a row of the batch, a document or a group of heads."""
        part = self._parts.setdefault(key, KeyState())
        return part if self._of_call is None else self._parts_of_call.setdefault(key, part.for_call())

    def take_over(self, other: KeyState) -> None:
        """Copy the statistics of another state, after a prompt that began at its first token."""
        self._blocks.update((name, x.clone()) for name, x in other._blocks.items())
        for key, part in other._parts.items():
            self.part(key).take_over(part)

    def of_blocks(
        self, name: Hashable, x: Tensor, size: int, before: int, compute: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``compute(x)`` of all tokens [B, H, N, D]; known results of whole blocks before this chunk are used again.

        ``size`` is the block size, ``before`` the number of tokens before the chunk.
        """
        if self._of_call is not None and (name, size) in self._of_call:
            of, found = self._of_call[name, size]
            if of is x:  # and not, for example, the keys of some heads
                return found
        known = self._earlier.get((name, size))
        # Keys before the chunk can't have changed; later ones may have been overwritten.
        count = 0 if known is None else min(known.shape[2], before // size)
        found = compute(x[:, :, count * size :])
        if known is not None and count:
            found = torch.cat([known[:, :, :count], found], dim=2)
        self._blocks[name, size] = found[:, :, : x.shape[2] // size]
        if self._of_call is not None:
            self._of_call[name, size] = x, found
        return found

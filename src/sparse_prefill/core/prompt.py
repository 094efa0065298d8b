"""A prompt: what its tokens are, and which pairs of them may attend to each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core import block_grid, sub_prompts, token_mask
from sparse_prefill.core.copies import copy_with
from sparse_prefill.core.key_state import KeyState
from sparse_prefill.core.prompt_cache import CacheKey
from sparse_prefill.core.prompt_shape import PromptShape
from sparse_prefill.core.renamed import former_name, warn_renamed
from sparse_prefill.core.token_mask import MaskMod

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Prompt(PromptShape):
    """The shape of a prompt: lengths, chunk offset, padding, documents, sliding window and the block grid.

    Every rule of what may be attended is here. The queries are the last ``q_len`` of the ``kv_len`` tokens: query row
    ``r`` is at position ``kv_len - q_len + r``. So a prompt is a chunk after a cached prefix, or whole if both lengths
    agree. Block ``i`` of the queries holds rows ``[i * block_size, (i + 1) * block_size)``, block ``j`` of the keys
    likewise. The last block of each may be ragged.

    Notation used for tensor shapes:
        B: batch size, or 1 if all rows of the batch agree; n_q, n_k: number of query and key blocks.

    Args:
        q_len (int): number of query tokens, at least 1.
        kv_len (int | None): number of key tokens, at least ``q_len``. Default: ``q_len``.
        block_size (int): tokens in a block, a power of two from 16 on. Default: 128.
        left_padding (Tensor | Sequence[int] | None): padding tokens before each prompt of the batch, shape [B], each
            in ``[0, kv_len]``. Padding is never attended, scored or pooled. Default: None.
        documents (Tensor | Sequence | None): document id of each key token, shape [kv_len] or [B, kv_len],
            non-decreasing along the tokens. Tokens attend inside their own document only. Default: None.
        total_len (int | None): number of tokens of the whole prompt, if this is a chunk of it and others follow. It
            decides which rows :meth:`tail_blocks` returns. At least ``kv_len``. Default: ``kv_len``, i.e. nothing
            follows.
        right_padding (Tensor | Sequence[int] | None): padding tokens after each prompt of the batch, like
            ``left_padding``. Both together are at most ``kv_len``. Default: None.
        window (int | None): sliding window: a token attends to itself and the ``window - 1`` tokens before it.
            Default: None, i.e. to all tokens before it.

    Attributes:
        state (KeyState | None): statistics of the keys of earlier chunks; see :meth:`with_state`.
        cache (PromptCache): tables that were computed for this prompt, shared by the layers of a model.

    Raises:
        ValueError: if a length, the block size, the padding, the documents or the window are out of range, or if both
            padding and documents are given (make the padding a document).

    Example:
        >>> prompt = Prompt(q_len=512, kv_len=8192)   # the last 512 tokens, after 7,680 cached ones
        >>> prompt.visible().shape
        torch.Size([1, 1, 4, 64])
    """

    state: KeyState | None = field(default=None, init=False, repr=False)

    # Other prompts of the same tokens -----------------------------------------------------------------------

    def on_grid(self, block_size: int) -> Prompt:
        """The same tokens in blocks of another size. It is cached, so that layers share its tables."""
        if block_size == self.block_size:
            return self
        return self.cache.get(CacheKey("grid", CPU, (block_size,)), lambda: replace(self, block_size=block_size))

    def with_state(self, state: KeyState | None) -> Prompt:
        """The same prompt with statistics of one layer's keys. It shares this prompt's cache."""
        return self if state is self.state else copy_with(self, state=state)

    def split_sequences(self) -> list[SubPrompt]:
        """The rows of a padded batch and packed documents as prompts.

        They are cached, so that layers share their tables. Rows and documents without a query, such as a row of padding
        or a document of earlier chunks, are left out.
        """
        return self._sub_prompts(CacheKey("sequences", CPU), lambda: sub_prompts.sequence_spans(self))

    def chunks(self, blocks: int) -> list[SubPrompt]:
        """This prompt, which must be :attr:`is_single`, as chunks of ``blocks`` query blocks.

        Each has the keys up to its end. The last one may have one block more, so that none is as short as a decode
        step.
        """
        return self._sub_prompts(CacheKey("chunks", CPU, (blocks,)), lambda: sub_prompts.chunk_spans(self, blocks))

    def _sub_prompts(self, key: CacheKey, spans: Callable[[], list[sub_prompts.Span]]) -> list[SubPrompt]:
        return self.cache.get(key, lambda: [self._sub_prompt(span) for span in spans()])

    def _sub_prompt(self, span: sub_prompts.Span) -> SubPrompt:
        total_len = sub_prompts.total_len_of(self, span)
        prompt = Prompt(
            span.end - span.first, span.end - span.begin, self.block_size, total_len=total_len, window=self.window
        )
        queries, keys = slice(span.first - self.offset, span.end - self.offset), slice(span.begin, span.end)
        return SubPrompt(span.rows, queries, keys, prompt)

    # Tokens -----------------------------------------------------------------------------------------------

    def start(self, device: torch.device | str = "cpu") -> Tensor:
        """First real token of each prompt: int64 [B]."""
        return token_mask.start(self, device)

    def end(self, device: torch.device | str = "cpu") -> Tensor:
        """Token after the last real one of each prompt: int64 [B]."""
        return token_mask.end(self, device)

    def query_positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of each query row among the keys: int64 [q_len]."""
        return token_mask.query_positions(self, device)

    def may_attend(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Which query positions may attend to which keys.

        Args:
            rows (Tensor): query positions among the keys, int64 [m].
            keys (Tensor): key positions, int64 [k].

        Returns:
            Tensor: bool [B, 1, m, k], True where the pair is allowed.
        """
        return token_mask.may_attend(self, rows, keys)

    def num_common_keys(self, position: int) -> int:
        """Number of first keys that all queries from this position on may attend to. Masks need not cover these."""
        return token_mask.num_common_keys(self, position)

    def last_rows(self, count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Positions of the last query rows, int64 [count], and which keys they may attend to, bool [B, 1, count, l].

        The mask covers the last l keys. All these rows may attend to the keys before.
        """
        return token_mask.last_rows(self, device, count)

    def spread_rows(self, count: int, each: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """``each`` rows in each of ``count`` evenly spaced query blocks, or in all blocks if there are fewer.

        Returns:
            tuple[Tensor, Tensor, Tensor]: the blocks, int64 [m], the rows, int64 [m * each], and which keys these may
            attend to, bool [B, 1, m * each, kv_len].
        """
        return token_mask.spread_rows(self, device, count, each)

    def real_keys(self, device: torch.device | str = "cpu") -> Tensor:
        """Slots of the key grid with a real token, neither padding nor after the end: bool [B, n_k * block_size]."""
        return token_mask.real_keys(self, device)

    def real_queries(self, device: torch.device | str = "cpu") -> Tensor:
        """Slots of the query grid with a real token: bool [B, n_q * block_size]."""
        return token_mask.real_queries(self, device)

    def mask_mod(self, device: torch.device | str = "cpu", batch: int | None = None) -> MaskMod:
        """The token rule in FlexAttention's form, for blocks that are visible in part.

        Args:
            device (torch.device | str): where the tensors that it captures are. Default: "cpu".
            batch (int | None): batch size of the attention call. Default: :attr:`batch`.

        Returns:
            MaskMod: ``mask_mod(b, h, q_idx, kv_idx)``.
        """
        return token_mask.mask_mod(*self.mask_tensors(device, batch))

    def mask_tensors(
        self, device: torch.device | str = "cpu", batch: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors that :meth:`mask_mod` captures.

        Returns:
            tuple[Tensor, Tensor, Tensor | None]: the offset, int32 []; the first real token of each prompt, int32 [B];
            and the first key that each query row may attend to, int32 [B, slots], where documents, a window or right
            padding make it another one, else None. The slots cover whole kernel tiles, so they go beyond the last row.
        """
        return token_mask.mask_tensors(self, device, self.batch if batch is None else batch)

    # Blocks -----------------------------------------------------------------------------------------------

    def visible(self, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs with at least one allowed token pair: bool [B, 1, n_q, n_k]."""
        return block_grid.visible(self, device)

    def visible_rows(self, rows: slice, device: torch.device | str = "cpu") -> Tensor:
        """:meth:`visible` of some query blocks, for prompts whose table of all would be too large. It isn't cached."""
        return block_grid.visible_rows(self, device, rows)

    def fully_visible(self, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs in which every token pair is allowed and the key block isn't ragged: bool [B, 1, n_q, n_k]."""
        return block_grid.fully_visible(self, device)

    def diagonal(self, device: torch.device | str = "cpu") -> Tensor:
        """Visible block pairs that hold a query's own position, which each row keeps: bool [B, 1, n_q, n_k]."""
        return block_grid.diagonal(self, device)

    def local_blocks(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs with a token pair less than ``tokens`` apart, causality not applied: bool [1, 1, n_q, n_k]."""
        return block_grid.local_blocks(self, device, tokens)

    def sink_blocks(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs whose keys hold one of the first ``tokens`` real tokens: bool [B, 1, n_q, n_k].

        These are the first tokens of the prompt or, if there are documents, of each document.
        """
        return block_grid.sink_blocks(self, device, tokens)

    def tail_blocks(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Block pairs whose queries hold one of the last ``tokens`` of the whole prompt: bool [1, 1, n_q, n_k]."""
        return block_grid.tail_blocks(self, device, tokens)

    def guards(self, sink: int, local: int, last: int, device: torch.device | str = "cpu") -> Tensor:
        """Blocks that a strategy keeps whatever it selects: bool [B, 1, n_q, n_k].

        These are :meth:`diagonal` and the visible ones among :meth:`sink_blocks`, :meth:`local_blocks` and
        :meth:`tail_blocks` of the given numbers of tokens. 0 tokens add none.
        """
        return block_grid.guards(self, device, sink, local, last)

    def whole_blocks(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Which key blocks end at or before each query row, and are in its document if there are several.

        Returns:
            tuple[Tensor, Tensor]: the first of these blocks and the block after the last, int32 [B, q_len] each. Where
            there is none, the first isn't less than the other. The first block may hold padding, or keys before the
            window.
        """
        return block_grid.whole_blocks(self, device)

    # Former names -----------------------------------------------------------------------------------------

    pieces = former_name("Prompt.pieces", split_sequences)
    near = former_name("Prompt.near", local_blocks)
    first = former_name("Prompt.first", sink_blocks)
    last = former_name("Prompt.last", tail_blocks)

    @property
    def shared(self) -> dict[Hashable, Any]:
        """Former place of values that layers share; use :attr:`cache`."""
        warn_renamed("Prompt.shared", "Prompt.cache", stacklevel=3)
        return self.cache.get(CacheKey("shared", CPU), dict)


class SubPrompt(NamedTuple):
    """A part of a prompt that is a prompt itself: a row of a padded batch, a packed document or a chunk.

    Its tensors are ``q[rows, :, queries]``, ``k[rows, :, keys]`` and ``v[rows, :, keys]``.
    """

    rows: slice
    queries: slice
    keys: slice
    prompt: Prompt

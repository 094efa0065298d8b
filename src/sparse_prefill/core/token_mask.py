"""Which tokens of a prompt may attend to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from sparse_prefill.core.prompt_cache import cached
from sparse_prefill.core.prompt_shape import PromptShape

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
MIN_MASK_TABLE = 1 << 18  # entries of a table of first keys: 1 MB for each row of a batch


@cached
def start(shape: PromptShape, device: torch.device) -> Tensor:
    """First real token of each prompt: int64 [B]."""
    if shape.left_padding is None:
        return torch.zeros(shape.batch, dtype=torch.int64, device=device)
    return cast(Tensor, shape.left_padding).to(device)


@cached
def end(shape: PromptShape, device: torch.device) -> Tensor:
    """Token after the last real one of each prompt: int64 [B]."""
    if shape.right_padding is None:
        return torch.full((shape.batch,), shape.kv_len, dtype=torch.int64, device=device)
    return shape.kv_len - cast(Tensor, shape.right_padding).to(device)


def document_ids(shape: PromptShape, device: torch.device | str) -> Tensor:
    """Document of each token of a prompt that has documents: int64 [B, kv_len]."""
    return cast(Tensor, shape.documents).to(device)


def document_starts(shape: PromptShape, device: torch.device | str) -> Tensor:
    """First token of each token's document, of a prompt that has documents: int64 [B, kv_len]."""
    ids = document_ids(shape, device).contiguous()
    return torch.searchsorted(ids, ids)


def query_positions(shape: PromptShape, device: torch.device | str) -> Tensor:
    """Position of each query row among the keys: int64 [q_len]."""
    return torch.arange(shape.offset, shape.kv_len, device=device)


def may_attend(shape: PromptShape, rows: Tensor, keys: Tensor) -> Tensor:
    """Which query positions, int64 [m], may attend to which keys, int64 [k]: bool [B, 1, m, k]."""
    allowed = (rows[:, None] >= keys)[None, None]  # [1, 1, m, k]
    if shape.window is not None:
        allowed = allowed & (rows[:, None] - keys < shape.window)
    if shape.right_padding is not None:  # causality hides the keys from all other rows
        allowed = allowed & (rows < end(shape, rows.device)[:, None])[:, None, :, None]
    if shape.left_padding is not None:
        allowed = allowed & (keys >= start(shape, keys.device)[:, None])[:, None, None]
    if shape.documents is not None:
        ids = document_ids(shape, keys.device)
        allowed = allowed & (ids[:, rows, None] == ids[:, None, keys])[:, None]
    return allowed


def num_common_keys(shape: PromptShape, position: int) -> int:
    """Number of first keys that all queries from this position on may attend to."""
    return position if shape.is_causal else 0


@cached
def last_rows(shape: PromptShape, device: torch.device, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the last query rows, int64 [count], and which of the last l keys they may attend to.

    The second is bool [B, 1, count, l]. All these rows may attend to the keys before.
    """
    rows = query_positions(shape, device)[-count:]
    keys = torch.arange(num_common_keys(shape, shape.kv_len - count), shape.kv_len, device=device)
    return rows, may_attend(shape, rows, keys)


@cached
def spread_rows(shape: PromptShape, device: torch.device, count: int, each: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of evenly spaced query blocks.

    Returns the blocks, int64 [m], ``each`` rows of each block, int64 [m * each], and which keys these rows may attend
    to, bool [B, 1, m * each, kv_len].
    """
    m, size = min(count, shape.n_q), shape.block_size
    blocks = torch.arange(1, m + 1, device=device) * shape.n_q // (m + 1)
    within = torch.arange(1, 2 * each, 2, device=device) * size // (2 * each)
    rows = (blocks[:, None] * size + within).flatten().clamp(max=shape.q_len - 1)
    return blocks, rows, may_attend(shape, rows + shape.offset, torch.arange(shape.kv_len, device=device))


@cached
def real_keys(shape: PromptShape, device: torch.device) -> Tensor:
    """Slots of the key grid with a real token: bool [B, n_k * block_size]."""
    slots = torch.arange(shape.n_k * shape.block_size, device=device)
    return (slots >= start(shape, device)[:, None]) & (slots < end(shape, device)[:, None])


@cached
def real_queries(shape: PromptShape, device: torch.device) -> Tensor:
    """Slots of the query grid with a real token: bool [B, n_q * block_size]."""
    slots = torch.arange(shape.n_q * shape.block_size, device=device)
    real = (slots + shape.offset >= start(shape, device)[:, None]) & (slots < shape.q_len)
    return real & (slots + shape.offset < end(shape, device)[:, None])


def first_keys(shape: PromptShape, device: torch.device) -> Tensor:
    """First key that each query row may attend to, ``kv_len`` for rows of right padding: int64 [B, q_len]."""
    rows = query_positions(shape, device)
    if shape.documents is None:
        first = start(shape, device)[:, None].expand(-1, shape.q_len)
    else:
        first = document_starts(shape, device)[:, shape.offset :]
    if shape.window is not None:
        first = first.clamp(min=rows - shape.window + 1)
    if shape.right_padding is not None:
        first = torch.where(rows < end(shape, device)[:, None], first, shape.kv_len)
    return first


@cached
def mask_tensors(shape: PromptShape, device: torch.device, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors that :func:`mask_mod` captures.

    Returns the offset, int32 [], the first real token of each prompt, int32 [B], and the first key of each row, int32
    [B, slots], or None if that is the first real token for all rows.
    """
    offset = torch.full((), shape.offset, dtype=torch.int32, device=device)  # torch.tensor would wait for a GPU
    first_token = start(shape, device).int().expand(batch).contiguous()
    if shape.documents is None and shape.window is None and shape.right_padding is None:
        return offset, first_token, None
    tile = max(shape.block_size, 128)  # no kernel tile is larger, and a tile may reach beyond the last row
    slots = max(MIN_MASK_TABLE, 1 << (shape.q_len + tile - 1).bit_length())
    first = first_keys(shape, device).int()
    first = torch.nn.functional.pad(first, (0, slots - shape.q_len)).expand(batch, -1).contiguous()
    # The kernel compares each index with the table's sizes, and torch 2.13 can't write symbolic sizes into a CPU
    # kernel. So the sizes are constants: powers of two, of which there are few, and one for all up to 128K tokens.
    torch._dynamo.mark_static(first)
    return offset, first_token, first


def mask_mod(offset: Tensor, first_token: Tensor, row_first: Tensor | None) -> MaskMod:
    """The token rule over absolute positions. It captures tensors only, so that new values compile nothing."""

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx + offset >= kv_idx) & (kv_idx >= first_token[b])

    first = cast(Tensor, row_first)

    def from_first_key(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx + offset >= kv_idx) & (kv_idx >= first[b, q_idx])

    return causal if row_first is None else from_first_key

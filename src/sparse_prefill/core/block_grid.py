"""Which blocks of a prompt's grid hold token pairs that may attend to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.prompt_cache import cached
from sparse_prefill.core.prompt_shape import PromptShape
from sparse_prefill.core.token_mask import document_ids, document_starts, end, first_keys, query_positions, start


class BlockEdges(NamedTuple):
    """First and last position of each query block, int64 [n_q], and of each key block, int64 [n_k]."""

    q_first: Tensor
    q_last: Tensor
    k_first: Tensor
    k_last: Tensor


def block_edges(shape: PromptShape, device: torch.device | str) -> BlockEdges:
    """The positions at which blocks begin and end."""
    i = torch.arange(shape.n_q, device=device) * shape.block_size
    j = torch.arange(shape.n_k, device=device) * shape.block_size
    return BlockEdges(
        q_first=shape.offset + i,
        q_last=shape.offset + (i + shape.block_size).clamp(max=shape.q_len) - 1,
        k_first=j,
        k_last=(j + shape.block_size).clamp(max=shape.kv_len) - 1,
    )


@cached
def visible(shape: PromptShape, device: torch.device) -> Tensor:
    """Block pairs with at least one allowed token pair: bool [B, 1, n_q, n_k]."""
    return visible_rows(shape, device, slice(None))


def visible_rows(shape: PromptShape, device: torch.device | str, rows: slice) -> Tensor:
    """:func:`visible` of some query blocks, for prompts whose table of all would be too large."""
    device = torch.device(device)
    edges = block_edges(shape, device)
    q_first, q_last = edges.q_first[rows], edges.q_last[rows]
    begin, stop = _real_span(shape, device)
    first_key, last_key = torch.maximum(edges.k_first, begin), torch.minimum(edges.k_last, stop - 1)  # [B, 1, n_k]
    last_row = torch.minimum(q_last[:, None], stop - 1)  # [B, n_q, 1]
    table = (first_key <= last_key) & (first_key <= last_row) & (q_first[:, None] < stop)
    if shape.window is not None:  # the nearest pair
        table = table & (q_first[:, None] - last_key < shape.window)
    if shape.documents is not None:
        # Ids don't decrease, so an earlier key block shares a document with the query block at its last token.
        ids = document_ids(shape, device)
        table = table & (ids[:, None, edges.k_last] >= ids[:, q_first, None])
    return table[:, None]


@cached
def fully_visible(shape: PromptShape, device: torch.device) -> Tensor:
    """Block pairs in which every token pair is allowed and the key block isn't ragged: bool [B, 1, n_q, n_k]."""
    q_first, q_last, k_first, k_last = block_edges(shape, device)
    begin, stop = _real_span(shape, device)
    whole = k_first + shape.block_size <= shape.kv_len
    table = whole & (k_last <= q_first[:, None]) & (k_first >= begin) & (q_last[:, None] < stop)
    if shape.window is not None:  # the farthest pair
        table = table & (q_last[:, None] - k_first < shape.window)
    if shape.documents is not None:
        ids = document_ids(shape, device)
        table = table & (ids[:, None, k_first] == ids[:, q_last, None])
    return table[:, None]


@cached
def diagonal(shape: PromptShape, device: torch.device) -> Tensor:
    """Visible block pairs that hold a query's own position: bool [B, 1, n_q, n_k]."""
    q_first, q_last, k_first, k_last = block_edges(shape, device)
    own = (k_first <= q_last[:, None]) & (k_last >= q_first[:, None])
    return own & visible(shape, device)


def local_blocks(shape: PromptShape, device: torch.device | str, tokens: int) -> Tensor:
    """Block pairs with a token pair less than ``tokens`` apart: bool [1, 1, n_q, n_k]."""
    edges = block_edges(shape, device)
    return (edges.q_first[:, None] - edges.k_last < tokens)[None, None]


@cached
def sink_blocks(shape: PromptShape, device: torch.device, tokens: int) -> Tensor:
    """Block pairs whose keys hold one of the first ``tokens`` of the prompt or of a document: bool [B, 1, n_q, n_k]."""
    if shape.documents is None:
        edges = block_edges(shape, device)
        begin = start(shape, device)[:, None]  # [B, 1]
        held = (edges.k_first < begin + tokens) & (edges.k_last >= begin) & (tokens > 0)
    else:
        age = torch.arange(shape.kv_len, device=device) - document_starts(shape, device)
        held = _any_in_block(age < tokens, shape.n_k, shape.block_size)
    return held[:, None, None].expand(-1, -1, shape.n_q, -1)


def tail_blocks(shape: PromptShape, device: torch.device | str, tokens: int) -> Tensor:
    """Block pairs whose queries hold one of the last ``tokens`` of the whole prompt: bool [1, 1, n_q, n_k]."""
    q_last = block_edges(shape, device).q_last
    return (q_last >= shape.whole_len - tokens)[None, None, :, None].expand(-1, -1, -1, shape.n_k)


@cached
def guards(shape: PromptShape, device: torch.device, sink: int, local: int, last: int) -> Tensor:
    """Visible blocks that are kept whatever a strategy selects: bool [B, 1, n_q, n_k]."""
    kept = diagonal(shape, device)
    for blocks, tokens in ((sink_blocks, sink), (local_blocks, local), (tail_blocks, last)):
        if tokens:
            kept = kept | blocks(shape, device, tokens)
    return kept & visible(shape, device)


@cached
def whole_blocks(shape: PromptShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """The range of key blocks of each query row's document that end at or before the row.

    Returns the first of these blocks and the block after the last one, int32 [B, q_len] each.
    """
    rows, first_key, size = query_positions(shape, device), first_keys(shape, device), shape.block_size
    stop = torch.where(rows == shape.kv_len - 1, shape.n_k, (rows + 1) // size)
    first = (first_key + size - 1) // size if shape.documents is not None else first_key // size
    first = torch.where(first_key == shape.kv_len, shape.n_k, first)
    return first.int(), stop.expand(len(first), -1).int()


def _real_span(shape: PromptShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """First real token of each prompt, and the token after its last one: int64 [B, 1, 1] each."""
    return start(shape, device)[:, None, None], end(shape, device)[:, None, None]


def _any_in_block(tokens: Tensor, blocks: int, block_size: int) -> Tensor:
    """Blocks in which a token is True: bool [B, tokens] to [B, blocks]."""
    pad = blocks * block_size - tokens.shape[-1]
    return torch.nn.functional.pad(tokens, (0, pad)).unflatten(-1, (blocks, block_size)).any(-1)

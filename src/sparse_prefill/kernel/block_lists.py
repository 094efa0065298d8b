"""Compact a keep table into the block lists that FlexAttention reads. Nothing else makes such lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from sparse_prefill.core.fused import compile_on_gpu
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.prompt_cache import cached
from sparse_prefill.core.token_mask import MaskMod
from sparse_prefill.kernel.segments import Segment, concat_columns, segment_table

SCRATCH_ENTRIES = 1 << 24  # of a table that are compacted at once without reading back, 20 bytes each
FLEX_DECODING_QUERIES = 128  # fewer queries may run torch's FlexDecoding kernel on a GPU


class BlockTables(NamedTuple):
    """The key blocks that each query block reads: int32 lists and their lengths.

    A kept block is in the *full* list if all of its token pairs may attend. The kernel evaluates no mask for it. The
    other kept blocks (the causal edge, padding, document borders, the ragged end) are in the *partial* list.

    Shapes: counts [B, H, n_q] and indices [B, H, n_q, width], of which the first ``count`` entries are valid. B and H
    are 1 where all rows or heads agree.
    """

    partial_counts: Tensor
    partial_indices: Tensor
    full_counts: Tensor
    full_indices: Tensor


def block_tables(keep: Tensor, prompt: Prompt, segments: Sequence[Segment] = ()) -> BlockTables:
    """Compact a keep table into block lists, without reading a value back from the device.

    On a CPU, lists are as wide as the longest row. Elsewhere they have room for the longest possible row, since its
    length would have to be read back. So all prompts of one length have lists of one shape.

    Args:
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k], within ``prompt.visible()``. Expanded rows or heads are
            compacted once.
        prompt (Prompt): lengths, padding, documents and window of the tokens.
        segments (Sequence[Segment]): further keys after those of the prompt. Default: none.

    Returns:
        BlockTables: the lists. 128K tokens and 32 heads take 13 MB at 10 % density on a CPU, 140 MB elsewhere.
    """
    batch_and_heads = keep.shape[:2]
    keep = keep[: 1 if keep.stride(0) == 0 else None, : 1 if keep.stride(1) == 0 else None]
    full = keep & prompt.fully_visible(keep.device)
    edge, exists = _edge_blocks(prompt, keep.device)
    edge = edge.expand(*full.shape[:3], -1)
    partial = keep.expand(full.shape).gather(-1, edge) & exists
    if segments:
        slots = segment_table(segments, prompt.block_size).unflatten(-1, (-1, prompt.block_size))
        segment_blocks = torch.arange(prompt.n_k, prompt.n_k + slots.shape[-2], device=keep.device)
        edge = concat_columns(edge, segment_blocks.expand(1, 1, 1, -1))
        partial = concat_columns(partial, slots.any(-1) & ~slots.all(-1))
        full = concat_columns(full, slots.all(-1))
    tables = BlockTables(*_few_listed(partial, edge), *_full_lists(full))
    shape = torch.broadcast_shapes(batch_and_heads, full.shape[:2])
    tables = BlockTables(*(x.expand(*shape, *x.shape[2:]).contiguous() for x in tables))
    if keep.device.type == "cpu":
        return tables._replace(partial_indices=_as_wide_as(full.shape[-1], tables.partial_indices))
    if torch.__version__ < "2.12" or prompt.q_len < FLEX_DECODING_QUERIES:
        return tables._replace(partial_indices=_equally_wide(tables.partial_indices, tables.full_indices))
    return tables


def to_block_mask(keep: Tensor, prompt: Prompt, batch: int | None = None) -> BlockMask:
    """A keep table as a ``BlockMask`` for a *compiled* ``flex_attention``.

    The mask is for attention only. It has no lists for a backward pass, and its lists are narrow, so that printing it
    or ``to_dense()`` may fail.

    Args:
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k], within ``prompt.visible()``.
        prompt (Prompt): lengths, padding, documents and window of the tokens.
        batch (int | None): batch size of the attention call. Default: that of ``keep``.

    Returns:
        BlockMask: the mask, with the prompt's ``mask_mod``.
    """
    mask_mod = prompt.mask_mod(keep.device, keep.shape[0] if batch is None else batch)
    return from_tables(block_tables(keep, prompt), prompt.block_size, (prompt.q_len, prompt.kv_len), mask_mod)


def from_tables(tables: BlockTables, block_size: int, lengths: tuple[int, int], mask_mod: MaskMod) -> BlockMask:
    """A ``BlockMask`` of block lists, lengths (of queries and of keys) and a token-level rule."""
    return BlockMask.from_kv_blocks(
        tables.partial_counts,
        tables.partial_indices,
        tables.full_counts,
        tables.full_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=lengths,
        compute_q_blocks=False,  # only a backward pass reads them
    )


def check_keep(keep: Tensor, q: Tensor, prompt: Prompt) -> None:
    """Raise ValueError unless a table is bool and broadcastable to [B, Hq, n_q, n_k]. Torch doesn't check it."""
    want = (q.shape[0], q.shape[1], prompt.n_q, prompt.n_k)
    fits = keep.ndim == 4 and all(size in (1, full) for size, full in zip(keep.shape, want, strict=True))
    if keep.dtype != torch.bool or not fits:
        raise ValueError(
            f"A keep table must be bool and broadcastable to [batch, query heads, query blocks, key blocks] = "
            f"{list(want)}, got {keep.dtype} of shape {list(keep.shape)}."
        )
    if keep.device != q.device:
        raise ValueError(f"A keep table must be on the device of q, got {keep.device} and {q.device}.")


@cached
def _edge_blocks(prompt: Prompt, device: torch.device) -> tuple[Tensor, Tensor]:
    """The key blocks that are partly visible to each query block: their ids, and which of the ids are valid.

    Shapes: ascending ids, int64 [B, 1, n_q, width], and bool [B, 1, n_q, width]. These are a few of the n_k columns,
    the same for all heads and layers.
    """
    table = prompt.visible(device) & ~prompt.fully_visible(device)
    columns = torch.arange(prompt.n_k, dtype=torch.int32, device=device).expand(table.shape)
    counts, ids = _listed(table, columns, max(prompt.n_k, _most_edge_blocks(prompt)) + 1)
    ids = ids[..., : _most_edge_blocks(prompt)].long()
    return ids, torch.arange(ids.shape[-1], device=device) < counts[..., None]


def _most_edge_blocks(prompt: Prompt) -> int:
    """An upper bound, known on the CPU, of the partly visible key blocks of any query block."""
    if prompt.documents is not None or prompt.right_padding is not None:
        return int((prompt.visible() & ~prompt.fully_visible()).sum(-1).max())
    # The causal edge crosses up to two key blocks, the window's end two, and the end of the padding one.
    return 2 + 2 * (prompt.window is not None) + (prompt.left_padding is not None)


def _listed(table: Tensor, columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Counts [B, H, n_q] of the True entries, and their columns in order, int32 [B, H, n_q, width].

    ``width`` is larger than any count. All other columns are written to the last place.
    """
    slot = torch.where(table, table.cumsum(-1, dtype=torch.int32) - 1, width - 1).long()
    indices = torch.zeros(*table.shape[:-1], width, dtype=torch.int32, device=table.device)
    return table.sum(-1, dtype=torch.int32), indices.scatter_(-1, slot, columns)


def _few_listed(table: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_listed` of narrow tables. ``columns`` are the ids of their columns, broadcastable to their shape."""
    counts, indices = _rows_listed(table.flatten(0, -2), columns.expand(table.shape).flatten(0, -2))
    return counts.view(table.shape[:-1]), indices.view(*table.shape[:-1], -1)


@compile_on_gpu
def _rows_listed(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return _listed(rows, columns.to(torch.int32), rows.shape[-1] + 1)


def _full_lists(full: Tensor) -> tuple[Tensor, Tensor]:
    return _as_wide_as_needed(full) if full.device.type == "cpu" else _as_wide_as_possible(full)


def _as_wide_as_needed(table: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, H, n_q] and ascending column ids [B, H, n_q, width] of the True entries.

    The width is at least 2, since torch compiles a width of 1 as a special case.
    """
    counts = table.sum(-1, dtype=torch.int32)
    width = max(2, int(counts.max()))
    row, column = table.flatten(0, -2).nonzero(as_tuple=True)
    begin = counts.flatten().cumsum(0) - counts.flatten()
    slot = torch.arange(row.numel(), device=table.device) - begin[row]
    indices = torch.zeros(counts.numel(), width, dtype=torch.int32, device=table.device)
    indices[row, slot] = column.to(torch.int32)
    return counts, indices.view(*counts.shape, width)


def _as_wide_as_possible(table: Tensor) -> tuple[Tensor, Tensor]:
    """The same lists with the width of the table, rounded up to lines of 16 ids; nothing is read back."""
    rows, width = table.flatten(0, -2), (table.shape[-1] // 16 + 1) * 16
    if rows.is_cuda:  # the compiled function needs no scratch memory
        counts, indices = _in_lines_of_16(rows)
    else:
        counts, indices = (
            torch.empty(len(rows), *more, dtype=torch.int32, device=rows.device) for more in ((), (width,))
        )
        at_once = max(1, SCRATCH_ENTRIES // width)
        for i in range(0, len(rows), at_once):
            part = slice(i, i + at_once)
            counts[part], indices[part] = _in_lines_of_16(rows[part])
    return counts.view(table.shape[:-1]), indices.view(*table.shape[:-1], width)


@compile_on_gpu
def _in_lines_of_16(rows: Tensor) -> tuple[Tensor, Tensor]:
    columns = torch.arange(rows.shape[-1], dtype=torch.int32, device=rows.device)
    return _listed(rows, columns.expand(rows.shape), (rows.shape[-1] // 16 + 1) * 16)


def _as_wide_as(columns: int, indices: Tensor) -> Tensor:
    """A view of ``indices`` whose rows have ``columns`` entries and overlap in memory.

    The CPU lowering refuses a partial list narrower than the keys, though it reads only the counted entries.
    """
    columns = max(columns, indices.shape[-1] + 1)  # torch would compile rows without overlap as a special case
    flat = pad(indices.flatten(), (0, columns))
    return flat.as_strided((*indices.shape[:-1], columns), (*indices.stride()[:-1], 1))


def _equally_wide(indices: Tensor, like: Tensor) -> Tensor:
    """``indices`` padded to the width of ``like``.

    Some Triton kernels read both lists with the strides of the partial one: FlexAttention before torch 2.12, and
    FlexDecoding up to 2.14 at least.
    """
    return pad(indices, (0, like.shape[-1] - indices.shape[-1]))

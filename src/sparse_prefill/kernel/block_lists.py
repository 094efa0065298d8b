"""From a keep table to the block lists that FlexAttention reads: the one place that makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from sparse_prefill.core.fused import compile_on_gpu
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.prompt_cache import cached
from sparse_prefill.core.token_mask import MaskMod

SCRATCH = 1 << 24  # entries of tables that are compacted at once where nothing is read back, 20 bytes each
SHORT = 128  # queries under which torch takes another kernel on a GPU


class BlockTables(NamedTuple):
    """Key blocks that each query block reads, as int32 lists with a count in front.

    Kept blocks whose token pairs may all attend are in the *full* list, for which the kernel evaluates no mask;
    the other kept ones (the causal edge, padding, document borders, the ragged end) are in the *partial* list.

    Shapes, with B and H each 1 where all rows or heads agree: counts [B, H, n_q], indices [B, H, n_q, width], only
    the first ``count`` of which mean anything.
    """

    partial_counts: Tensor
    partial_indices: Tensor
    full_counts: Tensor
    full_indices: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """Keys and values of no token, such as means of blocks, behind those of the prompt and in the same softmax.

    Args:
        k (Tensor): keys [B, Hkv, S, D].
        v (Tensor): values [B, Hkv, S, Dv].
        keep (Tensor): which of them the rows of each query block attend, bool [B or 1, Hq or 1, n_q, S].
        bias (float | Tensor): added to their logits, one for all query heads or one for each, [Hq]. Default: 0.
    """

    k: Tensor
    v: Tensor
    keep: Tensor
    bias: float | Tensor = 0.0


def block_tables(keep: Tensor, prompt: Prompt, segments: Sequence[Segment] = ()) -> BlockTables:
    """Compact a keep table into block lists, without reading a value back from the device.

    On a CPU the lists are as wide as the longest row needs. Elsewhere that would have to be read back, so they are as
    wide as a row may get: prompts of one length have lists of one shape.

    Args:
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k], within ``prompt.visible()``. Rows or heads that are expanded
            are compacted once.
        prompt (Prompt): what the tokens are.
        segments (Sequence[Segment]): what stands behind the prompt's keys, each from a block's start on. Default:
            nothing.

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
        behind = torch.arange(prompt.n_k, prompt.n_k + slots.shape[-2], device=keep.device)
        edge = _concat_columns(edge, behind.expand(1, 1, 1, -1))
        partial = _concat_columns(partial, slots.any(-1) & ~slots.all(-1))
        full = _concat_columns(full, slots.all(-1))
    tables = BlockTables(*_few_listed(partial, edge), *_full_lists(full))
    shape = torch.broadcast_shapes(batch_and_heads, full.shape[:2])
    tables = BlockTables(*(x.expand(*shape, *x.shape[2:]).contiguous() for x in tables))
    if keep.device.type == "cpu":
        return tables._replace(partial_indices=_as_wide_as(full.shape[-1], tables.partial_indices))
    if torch.__version__ < "2.12" or prompt.q_len < SHORT:
        return tables._replace(partial_indices=_equally_wide(tables.partial_indices, tables.full_indices))
    return tables


def to_block_mask(keep: Tensor, prompt: Prompt, batch: int | None = None) -> BlockMask:
    """A keep table as a ``BlockMask`` for a *compiled* ``flex_attention``.

    Only the forward lists are filled, at narrow width, so the mask serves attention: printing it or
    ``to_dense()`` don't work on narrow lists in any torch release.

    Args:
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k], within ``prompt.visible()``.
        prompt (Prompt): what the tokens are.
        batch (int | None): batch size of the attention call. Default: that of ``keep``.

    Returns:
        BlockMask: the mask, with the prompt's own ``mask_mod``.
    """
    mask_mod = prompt.mask_mod(keep.device, keep.shape[0] if batch is None else batch)
    return from_tables(block_tables(keep, prompt), prompt.block_size, (prompt.q_len, prompt.kv_len), mask_mod)


def from_tables(tables: BlockTables, block_size: int, lengths: tuple[int, int], mask_mod: MaskMod) -> BlockMask:
    """The lists, the lengths (queries, keys) and the token-level rule as a ``BlockMask``."""
    return BlockMask.from_kv_blocks(
        tables.partial_counts,
        tables.partial_indices,
        tables.full_counts,
        tables.full_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=lengths,
        compute_q_blocks=False,  # the backward pass alone would read them
    )


def segment_table(segments: Sequence[Segment], block_size: int) -> Tensor:
    """Which slots of the segments each query block attends: bool [B or 1, Hq or 1, n_q, slots], in whole blocks."""
    table = segments[0].keep[..., :0]
    for segment in segments:
        table = _concat_columns(table, pad(segment.keep, (0, -segment.keep.shape[-1] % block_size)))
    return table


def check_segment(segment: Segment, q: Tensor, k: Tensor, v: Tensor, prompt: Prompt) -> None:
    """Raise ValueError unless the keys, values and table of a segment fit those of the prompt."""
    slots = segment.k.shape[2]
    for name, x, like in (("keys", segment.k, k), ("values", segment.v, v)):
        want = (*like.shape[:2], slots, like.shape[3])
        if x.shape != want or x.dtype != like.dtype or x.device != like.device:
            raise ValueError(
                f"The {name} of a segment must be {like.dtype} on {like.device} and of shape {list(want)}, got "
                f"{x.dtype} on {x.device} and {list(x.shape)}."
            )
    want = (q.shape[0], q.shape[1], prompt.n_q, slots)
    keep = segment.keep
    fits = (
        keep.ndim == 4
        and keep.shape[2:] == want[2:]
        and keep.shape[0] in (1, want[0])
        and keep.shape[1] in (1, want[1])
    )
    if keep.dtype != torch.bool or not fits or keep.device != q.device:
        raise ValueError(
            f"The table of a segment must be bool on {q.device} and [batch or 1, query heads or 1, query blocks, keys] "
            f"= {list(want)}, got {keep.dtype} on {keep.device} of shape {list(keep.shape)}."
        )


def check_keep(keep: Tensor, q: Tensor, prompt: Prompt) -> None:
    """Raise ValueError unless a table is bool and broadcastable to [B, Hq, n_q, n_k]: torch checks nothing."""
    want = (q.shape[0], q.shape[1], prompt.n_q, prompt.n_k)
    fits = keep.ndim == 4 and all(size in (1, full) for size, full in zip(keep.shape, want, strict=True))
    if keep.dtype != torch.bool or not fits:
        raise ValueError(
            f"A keep table must be bool and broadcastable to [batch, query heads, query blocks, key blocks] = "
            f"{list(want)}, got {keep.dtype} of shape {list(keep.shape)}."
        )
    if keep.device != q.device:
        raise ValueError(f"A keep table must be on the device of q, got {keep.device} and {q.device}.")


def _concat_columns(a: Tensor, b: Tensor) -> Tensor:
    """Two tables [B or 1, H or 1, n_q, any] as one."""
    shape = torch.broadcast_shapes(a.shape[:3], b.shape[:3])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], dim=-1)


@cached
def _edge_blocks(prompt: Prompt, device: torch.device) -> tuple[Tensor, Tensor]:
    """Key blocks that a query block sees in part: ascending ids, int64 [B, 1, n_q, width], and which of them exist.

    A few columns in place of all n_k, the same for every head and layer.
    """
    table = prompt.visible(device) & ~prompt.fully_visible(device)
    columns = torch.arange(prompt.n_k, dtype=torch.int32, device=device).expand(table.shape)
    counts, ids = _listed(table, columns, max(prompt.n_k, _most_edge_blocks(prompt)) + 1)
    ids = ids[..., : _most_edge_blocks(prompt)].long()
    return ids, torch.arange(ids.shape[-1], device=device) < counts[..., None]


def _most_edge_blocks(prompt: Prompt) -> int:
    """At least as many key blocks as any query block sees in part, told from what the CPU knows."""
    if prompt.documents is not None or prompt.right_padding is not None:
        return int((prompt.visible() & ~prompt.fully_visible()).sum(-1).max())
    # Two blocks in which causality begins, two in which the window ends, one in which padding does.
    return 2 + 2 * (prompt.window is not None) + (prompt.left_padding is not None)


def _listed(table: Tensor, columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Counts [B, H, n_q] of the True entries, and their columns in order, int32 [B, H, n_q, width].

    ``width`` is larger than any count: its last place is that of all columns that aren't listed.
    """
    slot = torch.where(table, table.cumsum(-1, dtype=torch.int32) - 1, width - 1).long()
    indices = torch.zeros(*table.shape[:-1], width, dtype=torch.int32, device=table.device)
    return table.sum(-1, dtype=torch.int32), indices.scatter_(-1, slot, columns)


def _few_listed(table: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_listed` of narrow tables, whose columns have the ids ``columns``, broadcastable to their shape."""
    counts, indices = _rows_listed(table.flatten(0, -2), columns.expand(table.shape).flatten(0, -2))
    return counts.view(table.shape[:-1]), indices.view(*table.shape[:-1], -1)


@compile_on_gpu
def _rows_listed(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return _listed(rows, columns.to(torch.int32), rows.shape[-1] + 1)


def _full_lists(full: Tensor) -> tuple[Tensor, Tensor]:
    return _as_wide_as_needed(full) if full.device.type == "cpu" else _as_wide_as_possible(full)


def _as_wide_as_needed(table: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, H, n_q] and ascending column ids [B, H, n_q, width] of the True entries; width is at least 2.

    Width 1 would be compiled as a special case.
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
    """The same without a look at the longest row: as wide as the table, in whole lines of 16 ids."""
    rows, width = table.flatten(0, -2), (table.shape[-1] // 16 + 1) * 16
    if rows.is_cuda:  # compiled, it needs no scratch
        counts, indices = _in_lines_of_16(rows)
    else:
        counts, indices = (
            torch.empty(len(rows), *more, dtype=torch.int32, device=rows.device) for more in ((), (width,))
        )
        at_once = max(1, SCRATCH // width)
        for i in range(0, len(rows), at_once):
            part = slice(i, i + at_once)
            counts[part], indices[part] = _in_lines_of_16(rows[part])
    return counts.view(table.shape[:-1]), indices.view(*table.shape[:-1], width)


@compile_on_gpu
def _in_lines_of_16(rows: Tensor) -> tuple[Tensor, Tensor]:
    columns = torch.arange(rows.shape[-1], dtype=torch.int32, device=rows.device)
    return _listed(rows, columns.expand(rows.shape), (rows.shape[-1] // 16 + 1) * 16)


def _as_wide_as(columns: int, indices: Tensor) -> Tensor:
    """A view of ``indices`` whose rows claim ``columns`` entries and overlap in memory.

    The CPU lowering refuses a partial list narrower than the keys, though it reads the counted entries only.
    """
    columns = max(columns, indices.shape[-1] + 1)  # rows that don't overlap would be compiled as a special case
    flat = pad(indices.flatten(), (0, columns))
    return flat.as_strided((*indices.shape[:-1], columns), (*indices.stride()[:-1], 1))


def _equally_wide(indices: Tensor, like: Tensor) -> Tensor:
    """A list as wide as another one, where the Triton kernel reads both with the strides of the first.

    Before torch 2.12 it does so always, and up to 2.14 at least, the one for few queries does.
    """
    return pad(indices, (0, like.shape[-1] - indices.shape[-1]))

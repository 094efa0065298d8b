"""Time the attention kernel by its options and by the order of its rows of blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timers import of_device
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import sparse_prefill as sp
from sparse_prefill.kernel.block_lists import BlockTables, from_tables
from sparse_prefill.kernel.flex import attend

OPTIONS: list[dict] = [
    {},  # what the library takes
    {"USE_TMA": False},  # what torch takes
    {"USE_TMA": True},
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 4},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    {"USE_TMA": True, "BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    {"PRESCALE_QK": True},
    {"BACKEND": "FLASH"},
]


def of_options(q: Tensor, k: Tensor, v: Tensor, tables: BlockTables, prompt: sp.Prompt, repeats: int) -> list[dict]:
    """Seconds of the kernel, by the options that it is given."""
    inputs, rows = sp.AttentionInputs(q=q, k=k, v=v, prompt=prompt), []
    for options in OPTIONS:
        try:
            with sp.kernel_options(**options):
                took = of_device(lambda: attend(inputs, tables), q, repeats)
            rows.append({"options": options, "seconds": took})
        except (RuntimeError, ValueError) as error:  # tiles that don't fit, or a backend that isn't there
            rows.append({"options": options, "error": first_line(error)})
    return rows


def of_orders(q: Tensor, k: Tensor, v: Tensor, tables: BlockTables, size: int, repeats: int) -> list[dict]:
    """Seconds of attention over rows of blocks in order, and over those with the most blocks first."""
    rows = []
    for order, run in (("as they stand", attend_in_order), ("heavy first", attend_heavy_first)):
        try:
            rows.append({"order": order, "seconds": of_device(lambda run=run: run(q, k, v, tables, size), q, repeats)})
        except RuntimeError as error:  # a kernel that doesn't compile
            rows.append({"order": order, "error": first_line(error)})
    return rows


def attend_heavy_first(q: Tensor, k: Tensor, v: Tensor, tables: BlockTables, size: int) -> Tensor:
    """Attention of whole causal prompts whose query blocks are taken by how many key blocks they read, most first."""
    order = (tables.partial_counts + tables.full_counts).argsort(dim=-1, descending=True, stable=True)  # [1, Hq, n_q]
    blocks = F.pad(q, (0, 0, 0, -q.shape[2] % size)).unflatten(2, (-1, size))
    moved = blocks.gather(2, order[..., None, None].expand_as(blocks)).flatten(2, 3)
    lists = (x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3]) if x.ndim == 4 else order) for x in tables)
    found = attend_in_order(moved, k, v, BlockTables(*lists), size, order).unflatten(2, (-1, size))
    out = torch.empty_like(found).scatter_(2, order[..., None, None].expand_as(found), found)
    return out.flatten(2, 3)[:, :, : q.shape[2]]


def attend_in_order(
    q: Tensor, k: Tensor, v: Tensor, tables: BlockTables, size: int, order: Tensor | None = None
) -> Tensor:
    """The kernel over whole causal prompts; ``order`` tells which query blocks the rows are, [1, Hq, n_q]."""

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx if order is None else order[b, h, q_idx // size] * size + q_idx % size) >= kv_idx

    mask = from_tables(tables, size, (q.shape[2], k.shape[2]), causal)
    return compiled_flex(q, k, v, block_mask=mask, enable_gqa=True)


compiled_flex = torch.compile(flex_attention, fullgraph=True, dynamic=False)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]

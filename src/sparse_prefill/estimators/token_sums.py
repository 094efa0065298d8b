"""Attention of query tokens to means of key blocks, summed over query blocks by FlexAttention itself."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sparse_prefill.core.fused import compile_on_gpu, exp2_shifted
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.block_shares import LEAST, LOG2_E, TINY

HALF_MAX = torch.finfo(torch.float16).max
TILE = 128  # means that a block of the block mask holds, and their number is made a multiple of
WIDTH = 16  # least dimension of keys and values that FlexAttention takes
OUTPUTS = 2**28  # elements of the attention's output, which nobody reads, that are held at once


def token_shares(q: Tensor, k_means: Tensor, prompt: Prompt, group: int) -> Tensor:
    """Scores of :class:`~sparse_prefill.estimators.TokenByMean`, without a table of logits.

    The roles are swapped: means of key blocks are the queries, and the tokens of one query block the keys. What such
    attention divides by is the sum of exponentials over these tokens, i.e. the score, of which FlexAttention returns
    the logarithm. Query blocks are its batch, and its block mask skips tiles of means that no token scores.

    Queries and means are rounded to fp16, which leaves those in bf16 what they are but for the smallest; products are
    summed in fp32. Scratch memory is a copy of the queries and 16 fp16 numbers for each score, of 2^28 at once, or of
    one query block's if these are more.

    Args:
        q (Tensor): queries in half precision, [B, Hq, M, D], D at least 16.
        k_means (Tensor): means of all key blocks, fp32 [B, Hkv, n_k, D].
        prompt (Prompt): what the tokens are.
        group (int): query heads that are taken as one.

    Returns:
        Tensor: fp32 [B, Hq / group, n_q, n_k].
    """
    batch, heads, _, dim = q.shape
    size, device = prompt.block_size, q.device
    tiles = tuple(_tiles(dim, size).items())
    at_once = max(1, OUTPUTS // (heads * _whole_tiles(prompt.n_k) * WIDTH))
    scores = torch.zeros(batch, heads // group, prompt.n_q, prompt.n_k, device=device)
    for begin in range(0, prompt.n_q, at_once):
        end = min(begin + at_once, prompt.n_q)
        rows = torch.arange(begin * size, end * size, device=device)
        seen = min(-(-(prompt.offset + end * size) // size), prompt.n_k)  # later key blocks are in no row's sight
        columns = torch.arange(_whole_tiles(seen), device=device)
        for b in range(batch):
            scored = (x[min(b, len(x) - 1), begin * size : end * size] for x in prompt.whole_blocks(device))
            first, stop = (F.pad(x, (0, len(rows) - len(x))) for x in scored)
            some, full = (x[:, None] for x in _tiles_scored(first, stop, columns[::TILE], size))
            row = torch.full((1,), b, device=device)
            shares = _shares(q, k_means, row, rows, columns, first, stop, some, full, size, group, tiles)
            scores[b, :, begin:end, :seen] = shares[..., :seen].transpose(0, 1)
    return scores


def _whole_tiles(means: int) -> int:
    return max(2, -(-means // TILE)) * TILE  # a size of 1 would be compiled as a special case


def _tiles(dim: int, block_size: int) -> dict[str, int]:
    """Means by tokens of a kernel's tile, for which any GPU since compute capability 8.0 has shared memory.

    A block of tokens is few tiles long, so there is little to load ahead, and more tiles should be under way.
    """
    rows, columns, warps = (128, 64, 8) if dim <= 128 else (64, 32, 4)
    return {"BLOCK_M": rows, "BLOCK_N": min(columns, block_size), "num_warps": warps, "num_stages": 2}


@compile_on_gpu
def _tiles_scored(firsts: Tensor, stops: Tensor, begins: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """1 for tiles that some of a block's queries score, but not all, and for those that all do: int32 [blocks, tiles].

    Args:
        firsts (Tensor): int32 [blocks * size], the first mean that each query scores.
        stops (Tensor): likewise, the mean behind the last one.
        begins (Tensor): int64 [tiles], the first mean of each.
        size (int): queries in a block.
    """
    first, stop = (x.unflatten(0, (-1, size))[..., None] for x in (firsts, stops))  # [blocks, size, 1]
    some = ((first < begins + TILE) & (stop > begins)).any(1)
    full = ((first <= begins) & (stop >= begins + TILE)).all(1)
    return (some & ~full).int(), full.int()


@compile_on_gpu
def _shares(
    q: Tensor,
    k_means: Tensor,
    batch: Tensor,
    rows: Tensor,
    columns: Tensor,
    firsts: Tensor,
    stops: Tensor,
    some: Tensor,
    full: Tensor,
    size: int,
    group: int,
    tiles: tuple[tuple[str, int], ...],
) -> Tensor:
    """Scores of some query blocks. Which, tensors say: of parts of ``q``, a kernel couldn't tell that they are aligned.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k_means (Tensor): means of key blocks, fp32 [B, Hkv, n_k, D].
        batch (Tensor): int64 [1], the row of the batch.
        rows (Tensor): int64 [blocks * size], the queries, of which those behind the last one are of no account.
        columns (Tensor): int64 [n], a whole number of tiles, likewise the means.
        firsts (Tensor): int32 [blocks * size], the first mean that each query scores.
        stops (Tensor): likewise, the mean behind the last one.
        some (Tensor): int32 [blocks, 1, tiles], 1 for tiles that some of a block's queries score, but not all. Made by
            another step: the kernel takes it for contiguous, which inductor doesn't promise of what it makes here.
        full (Tensor): likewise, for tiles that all score.
        size (int): queries in a block.
        group (int): heads that are taken as one.
        tiles (tuple): of the kernel, names and numbers.

    Returns:
        Tensor: fp32 [blocks, Hq / group, n].
    """
    kv_heads = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k_means.shape[1])
    means = _as_half(k_means[batch[:, None], kv_heads[:, None], columns.clamp(max=k_means.shape[2] - 1)])  # [Hq, n, D]
    tokens = _as_half(q.transpose(1, 2)[batch, rows.clamp(max=q.shape[2] - 1)])  # [blocks * size, Hq, D]
    tokens = tokens.unflatten(0, (-1, size)).transpose(1, 2)  # [blocks, Hq, size, D]
    blocks = tokens.shape[0]

    def scored(b: Tensor, h: Tensor, mean: Tensor, token: Tensor) -> Tensor:
        row = b * size + token
        return (mean >= firsts[row]) & (mean < stops[row])

    place = torch.zeros(*some.shape, 1, dtype=torch.int32, device=q.device)  # of the one block of tokens there is
    block_mask = BlockMask.from_kv_blocks(
        some,
        place,
        full,
        place,
        BLOCK_SIZE=(TILE, size),
        mask_mod=scored,
        seq_lengths=(means.shape[1], size),
        compute_q_blocks=False,
    )
    options: Any = {"BACKEND": "TRITON", "IS_DIVISIBLE": True, **dict(tiles)}
    _, aux = flex_attention(
        means.expand(blocks, -1, -1, -1),
        tokens,
        tokens[..., :WIDTH],
        block_mask=block_mask,
        return_aux=AuxRequest(lse=True),
        kernel_options=options,
    )
    sums = (cast(Tensor, aux.lse) * LOG2_E).unflatten(1, (-1, group))  # [blocks, Hq / group, group, n]
    energy = exp2_shifted(sums, sums.amax((2, 3), keepdim=True).clamp(min=LEAST)).sum(2)
    return energy / energy.sum(-1, keepdim=True).clamp(min=TINY)


def _as_half(x: Tensor) -> Tensor:
    return x.float().clamp(-HALF_MAX, HALF_MAX).half()  # bf16 has no 65504

"""Attention of queries to means of key blocks, summed over query blocks by FlexAttention."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sparse_prefill.core.fused import compile_on_gpu, exp2_shifted
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.block_shares import LOG2_E, LOWEST, TINY

FP16_MAX = torch.finfo(torch.float16).max
TILE_MEANS = 128  # in a block of the block mask; the number of means is padded to a multiple
MIN_HEAD_DIM = 16  # of the keys and values that FlexAttention takes
MAX_OUTPUT_ELEMENTS = 2**28  # of the attention's output, which isn't used, held at once


def token_shares(q: Tensor, k_means: Tensor, prompt: Prompt, group: int) -> Tensor:
    """Scores of :class:`~sparse_prefill.estimators.TokenByMean`, without a table of logits.

    FlexAttention runs with swapped roles: the means of key blocks are its queries, the tokens of one query block its
    keys. The normalizer of such an attention is the sum of exponentials over these tokens, which is the score before
    normalization, and FlexAttention returns its logarithm. Query blocks are the batch. The block mask skips tiles of
    means that no token scores.

    Queries and means are rounded to fp16, which holds all bf16 values of its range but the smallest exactly. Products
    are summed in fp32. Scratch memory is a copy of the queries and 16 fp16 numbers for each score, 2^28 numbers at
    once, or those of one query block if they are more.

    Args:
        q (Tensor): queries in half precision, [B, Hq, M, D], D at least 16.
        k_means (Tensor): means of all key blocks, fp32 [B, Hkv, n_k, D].
        prompt (Prompt): lengths, padding and documents of the tokens.
        group (int): number of consecutive query heads whose scores are summed.

    Returns:
        Tensor: fp32 [B, Hq / group, n_q, n_k].
    """
    batch, heads, _, dim = q.shape
    size, device = prompt.block_size, q.device
    tiles = tuple(_tiles(dim, size).items())
    at_once = max(1, MAX_OUTPUT_ELEMENTS // (heads * _whole_tiles(prompt.n_k) * MIN_HEAD_DIM))
    scores = torch.zeros(batch, heads // group, prompt.n_q, prompt.n_k, device=device)
    for begin in range(0, prompt.n_q, at_once):
        end = min(begin + at_once, prompt.n_q)
        rows = torch.arange(begin * size, end * size, device=device)
        seen = min(-(-(prompt.offset + end * size) // size), prompt.n_k)  # no row sees later key blocks
        columns = torch.arange(_whole_tiles(seen), device=device)
        for b in range(batch):
            scored = (x[min(b, len(x) - 1), begin * size : end * size] for x in prompt.whole_blocks(device))
            first, stop = (F.pad(x, (0, len(rows) - len(x))) for x in scored)
            some, full = (x[:, None] for x in _tiles_scored(first, stop, columns[::TILE_MEANS], size))
            row = torch.full((1,), b, device=device)
            shares = _shares(q, k_means, row, rows, columns, first, stop, some, full, size, group, tiles)
            scores[b, :, begin:end, :seen] = shares[..., :seen].transpose(0, 1)
    return scores


def _whole_tiles(means: int) -> int:
    return max(2, -(-means // TILE_MEANS)) * TILE_MEANS  # torch would compile a size of 1 as a special case


def _tiles(dim: int, block_size: int) -> dict[str, int]:
    """Tile of the kernel, means by tokens, that fits the shared memory of any GPU from compute capability 8.0 on.

    A block of tokens is only a few tiles long, so that there is little to load ahead: two stages are enough.
    """
    rows, columns, warps = (128, 64, 8) if dim <= 128 else (64, 32, 4)
    return {"BLOCK_M": rows, "BLOCK_N": min(columns, block_size), "num_warps": warps, "num_stages": 2}


@compile_on_gpu
def _tiles_scored(firsts: Tensor, stops: Tensor, begins: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Tiles that some, but not all, of a block's queries score, and tiles that all score: int32 [blocks, tiles].

    Args:
        firsts (Tensor): int32 [blocks * size], the first mean that each query scores.
        stops (Tensor): int32 [blocks * size], the mean after the last one that each query scores.
        begins (Tensor): int64 [tiles], the first mean of each.
        size (int): queries in a block.
    """
    first, stop = (x.unflatten(0, (-1, size))[..., None] for x in (firsts, stops))  # [blocks, size, 1]
    some = ((first < begins + TILE_MEANS) & (stop > begins)).any(1)
    full = ((first <= begins) & (stop >= begins + TILE_MEANS)).all(1)
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
    """Scores of some query blocks.

    Index tensors choose the queries and means: a kernel couldn't assume that slices of ``q`` are aligned.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k_means (Tensor): means of key blocks, fp32 [B, Hkv, n_k, D].
        batch (Tensor): int64 [1], the row of the batch.
        rows (Tensor): int64 [blocks * size], the queries; those after the last one of the prompt don't count.
        columns (Tensor): int64 [n], the means, a whole number of tiles; those after the last one don't count.
        firsts (Tensor): int32 [blocks * size], the first mean that each query scores.
        stops (Tensor): int32 [blocks * size], the mean after the last one that each query scores.
        some (Tensor): int32 [blocks, 1, tiles], 1 for tiles that some, but not all, of a block's queries score. The
            caller computes it: the kernel needs it contiguous, and inductor may lay out its own results otherwise.
        full (Tensor): int32 [blocks, 1, tiles], 1 for tiles that all queries of a block score.
        size (int): queries in a block.
        group (int): number of consecutive heads whose scores are summed.
        tiles (tuple): kernel options, names and numbers.

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

    place = torch.zeros(*some.shape, 1, dtype=torch.int32, device=q.device)  # there is one block of tokens, block 0
    block_mask = BlockMask.from_kv_blocks(
        some,
        place,
        full,
        place,
        BLOCK_SIZE=(TILE_MEANS, size),
        mask_mod=scored,
        seq_lengths=(means.shape[1], size),
        compute_q_blocks=False,
    )
    options: Any = {"BACKEND": "TRITON", "IS_DIVISIBLE": True, **dict(tiles)}
    _, aux = flex_attention(
        means.expand(blocks, -1, -1, -1),
        tokens,
        tokens[..., :MIN_HEAD_DIM],
        block_mask=block_mask,
        return_aux=AuxRequest(lse=True),
        kernel_options=options,
    )
    sums = (cast(Tensor, aux.lse) * LOG2_E).unflatten(1, (-1, group))  # [blocks, Hq / group, group, n]
    energy = exp2_shifted(sums, sums.amax((2, 3), keepdim=True).clamp(min=LOWEST)).sum(2)
    return energy / energy.sum(-1, keepdim=True).clamp(min=TINY)


def _as_half(x: Tensor) -> Tensor:
    return x.float().clamp(-FP16_MAX, FP16_MAX).half()  # clamped first, as bf16 has no 65504

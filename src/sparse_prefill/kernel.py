"""Attention over a keep table: the block lists and the one compiled FlexAttention call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sparse_prefill.block_mask import (
    BlockTables,
    Segment,
    block_tables,
    check_keep,
    check_segment,
    from_tables,
    segment_table,
)
from sparse_prefill.prompt import Prompt, mask_mod
from sparse_prefill.record import stage
from sparse_prefill.validation import check_attention_inputs, check_prompt

# Graphs of the one attention function in a process: dtypes x head dims x block sizes x batched or not x grad modes.
# Past it, torch raises (the function is compiled with fullgraph=True); it never falls back to eager, which is dense.
RECOMPILE_LIMIT = 256
DISTINCT_SIZES = {"use_duck_shape": False}


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    prompt: Prompt,
    scale: float | None = None,
    segments: Sequence[Segment] = (),
) -> Tensor:
    """Attention over the blocks of a keep table.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        v (Tensor): values [B, Hkv, N, Dv].
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k], within ``prompt.visible()``.
        prompt (Prompt): what the tokens are.
        scale (float | None): factor of the logits. Default: D ** -0.5.
        segments (Sequence[Segment]): keys and values of no token that share the softmax. Default: none.

    Returns:
        Tensor: [B, Hq, M, Dv]; rows that keep nothing are 0.

    Raises:
        ValueError: if the tensors, the table, the segments and the prompt don't fit each other.
    """
    check_attention_inputs(q, k, v)
    check_prompt(prompt, q, k)
    check_keep(keep, q, prompt)
    for segment in segments:
        check_segment(segment, q, k, v, prompt)
    with stage("table", q.device):
        tables = block_tables(keep, prompt, segments)
    with stage("kernel", q.device):
        return attend(q, k, v, tables, prompt, scale, segments)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: BlockTables,
    prompt: Prompt,
    scale: float | None = None,
    segments: Sequence[Segment] = (),
) -> Tensor:
    """Run the compiled kernel over block lists made by :func:`~sparse_prefill.block_mask.block_tables`."""
    # Under no_grad a leaf may still ask for gradients, which the CPU kernel takes for a call that needs a backward.
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()
    limit = RECOMPILE_LIMIT
    # One graph for all lengths: every size is symbolic, and sizes that happen to be equal aren't taken for one.
    limits = {"recompile_limit": limit, "accumulated_recompile_limit": limit}
    with dynamo_config.patch(limits), fx_config.patch(DISTINCT_SIZES):  # type: ignore[attr-defined]
        mask_tensors = prompt.mask_tensors(q.device, q.shape[0])
        if not segments:
            return _compiled()(q, k, v, tables, mask_tensors, prompt.block_size, scale)
        segment_tensors = _segment_tensors(segments, prompt)
        k = _joined(k, [segment.k for segment in segments], prompt.block_size)
        v = _joined(v, [segment.v for segment in segments], prompt.block_size)
        return _compiled_with_segments()(q, k, v, tables, mask_tensors, segment_tensors, prompt.block_size, scale)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, prompt: Prompt, scale: float | None = None) -> Tensor:
    """Attention over everything that the prompt allows, by SDPA where its own causality fits.

    Args, return value and errors as for :func:`block_sparse_attention`, without the table.
    """
    check_attention_inputs(q, k, v)
    check_prompt(prompt, q, k)
    if prompt.is_causal and prompt.q_len in (1, prompt.kv_len):
        return F.scaled_dot_product_attention(q, k, v, is_causal=prompt.q_len > 1, scale=scale, enable_gqa=True)
    if prompt.q_len == 1 or prompt.n_k == 1:
        rows, keys = prompt.query_positions(q.device), torch.arange(prompt.kv_len, device=q.device)
        allowed = prompt.may_attend(rows, keys)  # [B, 1, M, N], a single query or a single block
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)
        return out.masked_fill(~allowed.any(-1, keepdim=True), 0)  # rows of padding
    # A chunk or padding: SDPA would need an M x N mask.
    return attend(q, k, v, block_tables(prompt.visible(q.device), prompt), prompt, scale)


@cache
def _compiled():
    return torch.compile(_attend, fullgraph=True, dynamic=True)


def _attend(q, k, v, tables, mask_tensors, block_size, scale):
    lengths = (q.shape[2], k.shape[2])
    block_mask = from_tables(tables, block_size, lengths, mask_mod(*mask_tensors))
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True)


# Segments: more columns for the same softmax. Prompts without any run the function above, with no look-up and no bias.


class SegmentTensors(NamedTuple):
    """What the token-level rules of the segments capture.

    Shapes: first_slot int64 [], the first key behind the prompt's blocks; table bool [slots], flat; strides of its
    batch, head and query block, int64 [] each; biases of the segments with the first key of each, int64 [] and
    fp32 [].
    """

    first_slot: Tensor
    table: Tensor
    strides: tuple[Tensor, Tensor, Tensor]
    biases: tuple[tuple[Tensor, Tensor], ...]


def _segment_tensors(segments: Sequence[Segment], prompt: Prompt) -> SegmentTensors:
    size, device = prompt.block_size, segments[0].k.device

    def scalar(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    table = segment_table(segments, size)  # [B or 1, Hq or 1, n_q, slots]
    batch_stride, head_stride, row_stride, _ = table.stride()
    strides = (
        scalar(batch_stride if table.shape[0] > 1 else 0),
        scalar(head_stride if table.shape[1] > 1 else 0),
        scalar(row_stride),
    )
    # A kernel's tile may look at rows behind the last query block, and torch 2.13 can't spell a look-up in a table of
    # symbolic size on the CPU: as in Prompt, the sizes are constants, few of them as they are powers of two.
    tiles = max(1, 128 // size)
    length = max(1 << 16, 1 << (table.numel() + tiles * row_stride).bit_length())
    flat = F.pad(table.flatten(), (0, length - table.numel()))
    torch._dynamo.mark_static(flat)

    start, biases = prompt.n_k * size, []
    for segment in segments:
        biases.append((scalar(start), scalar(segment.bias, torch.float32)))
        start += -(-segment.k.shape[2] // size) * size
    return SegmentTensors(biases[0][0], flat, strides, tuple(biases))


def _joined(x: Tensor, parts: Sequence[Tensor], block_size: int) -> Tensor:
    """x [B, H, N, D] and parts [B, H, S, D] behind it, each filled up to whole blocks with zeros."""
    return torch.cat([F.pad(part, (0, 0, 0, -part.shape[2] % block_size)) for part in (x, *parts)], dim=2)


@cache
def _compiled_with_segments():
    return torch.compile(_attend_with_segments, fullgraph=True, dynamic=True)


def _attend_with_segments(q, k, v, tables, mask_tensors, segment_tensors, block_size, scale):
    first_slot, table, strides, biases = segment_tensors
    batch_stride, head_stride, row_stride = strides
    of_prompt = mask_mod(*mask_tensors)

    def token_rule(b, h, q_idx, kv_idx):
        slot = (kv_idx - first_slot).clamp(min=0)
        kept = table[b * batch_stride + h * head_stride + q_idx // block_size * row_stride + slot]
        return torch.where(kv_idx < first_slot, of_prompt(b, h, q_idx, kv_idx), kept)

    def with_bias(score, b, h, q_idx, kv_idx):
        added = torch.zeros_like(score)
        for first, bias in biases:
            added = torch.where(kv_idx >= first, bias, added)
        return score + added

    lengths = (q.shape[2], k.shape[2])
    block_mask = from_tables(tables, block_size, lengths, token_rule)
    return flex_attention(q, k, v, score_mod=with_bias, block_mask=block_mask, scale=scale, enable_gqa=True)

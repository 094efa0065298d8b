"""Attention over block lists: the two functions that compile to FlexAttention kernels, and how they are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad

from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.token_mask import mask_mod
from sparse_prefill.kernel.block_lists import BlockTables, from_tables
from sparse_prefill.kernel.compiled import Compiled, count_flops
from sparse_prefill.kernel.cpu_compile import compile_flex, kernel_dtype
from sparse_prefill.kernel.non_finite import are_finite, finite, with_non_finite
from sparse_prefill.kernel.options import options_for
from sparse_prefill.kernel.segment_rule import segment_tensors, with_segments
from sparse_prefill.kernel.segments import Segment, append_segments

# Graphs of one compiled function in a process: dtypes x head counts and dims x block sizes x one batch row or more x
# scales x memory layouts (on a GPU) x with or without a table of windows x inference mode or not. Over this limit torch
# raises, since the function is compiled with fullgraph=True. It never falls back to eager, which is dense.
RECOMPILE_LIMIT = 256
# Before torch 2.14, the Triton kernel counts elements in 32 bits. It misses keys of late tokens where the heads of a
# token are adjacent in memory and a tensor has at least this many elements. Fixed by pytorch/pytorch#186749.
INT32_ELEMENTS = 1 << 31


# torch.compile around a call would compile this function along with its own, for another backend.
@torch.compiler.disable(reason="sparse attention compiles its kernel by itself: compile without fullgraph=True")
def attend(inputs: AttentionInputs, tables: BlockTables, segments: Sequence[Segment] = ()) -> Tensor:
    """Attention over block lists, by the compiled kernel.

    Args:
        inputs (AttentionInputs): queries, keys, values, the prompt, and the scale and soft cap of the logits. Sinks are
            ignored here: they are one of the segments.
        tables (BlockTables): lists of :func:`~sparse_prefill.kernel.block_lists.block_tables`.
        segments (Sequence[Segment]): further keys and values that the lists include. Default: none.

    Returns:
        Tensor: [B, Hq, M, Dv]; rows without a kept block are 0.
    """
    if are_finite(inputs.q, inputs.k, inputs.v):
        return _run(inputs, tables, segments)
    finite_values = replace(inputs, v=finite(inputs.v))
    out = _run(finite_values, tables, [replace(x, v=finite(x.v)) for x in segments])
    return with_non_finite(out, inputs)


def _run(inputs: AttentionInputs, tables: BlockTables, segments: Sequence[Segment]) -> Tensor:
    q, k, v, prompt, logits = inputs.q, inputs.k, inputs.v, inputs.prompt, inputs.logits
    dtype, size, computed_in = q.dtype, prompt.block_size, kernel_dtype(q)
    scale = q.shape[-1] ** -0.5 if logits.scale is None else float(logits.scale)
    is_plain = not segments and logits.softcap is None
    options = options_for(q, v, size, is_plain=is_plain)
    count_flops("sparse_prefill.attend", lambda: _flops(tables, size, q.shape[-1] + v.shape[-1]))
    tables = BlockTables(*(x.detach() for x in tables))  # else the graph would depend on the tensors they are views of
    mask_tensors = prompt.mask_tensors(q.device, q.shape[0])
    if q.device.type == "cpu" and prompt.n_q == 1:
        tables = _with_an_empty_row(tables)
    if segments:
        k = append_segments(k, [segment.k for segment in segments], size)
        v = append_segments(v, [segment.v for segment in segments], size)
    laid_out = [_to_kernel_layout(x.to(computed_in)) for x in (q, k, v)]
    q, k, v, is_bnhd = *(x for x, _ in laid_out), tuple(flag for _, flag in laid_out)
    with torch.no_grad(), one_graph_for_all_lengths():
        if is_plain:
            return compiled()(q, k, v, is_bnhd, tables, mask_tensors, size, scale, options).to(dtype)
        softcap = None if logits.softcap is None else torch.full((), logits.softcap, device=q.device)
        modifiers = (softcap, segment_tensors(segments, prompt) if segments else None)
        out = compiled_with_modifiers()(q, k, v, is_bnhd, tables, mask_tensors, modifiers, size, scale, options)
        return out.to(dtype)


def _flops(tables: BlockTables, block_size: int, dims: int) -> int:
    """Operations of both products over the listed blocks, each computed whole: 2 per token pair and dimension."""
    blocks = int(tables.partial_counts.sum() + tables.full_counts.sum())
    return 2 * blocks * block_size**2 * dims


# Inputs of the kernel -------------------------------------------------------------------------------------


def _to_kernel_layout(x: Tensor) -> tuple[Tensor, bool]:
    """x [B, H, N, D] without a gradient in one of two memory layouts, and whether that is the second.

    The layouts are contiguous [B, H, N, D] and, on a GPU, contiguous [B, N, H, D]; x in any other layout is copied to
    the first. Each layout compiles a kernel. On a CPU, the copy costs less than it gains. A GPU's kernel can't know
    that the strides of other layouts and the offset of a view are multiples of 16 bytes, and would read keys and values
    two bytes at a time.
    """
    x = x.detach()
    is_bnhd = x.device.type != "cpu" and not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
    is_bnhd = is_bnhd and x.numel() < INT32_ELEMENTS
    x = x.transpose(1, 2) if is_bnhd else x
    in_place = x.is_contiguous() and x.storage_offset() == 0
    return x if in_place else x.clone(memory_format=torch.contiguous_format), is_bnhd


def _with_an_empty_row(tables: BlockTables) -> BlockTables:
    """Lists of one query block with an empty second one: torch compiles a size of 1 as a special case."""
    partial_counts, partial_indices, full_counts, full_indices = tables
    counts = (pad(x, (0, 1)) for x in (partial_counts, full_counts))
    indices = (pad(x, (0, 0, 0, 1)) for x in (partial_indices, full_indices))
    return BlockTables(*(x for pair in zip(counts, indices, strict=True) for x in pair))


@contextmanager
def one_graph_for_all_lengths() -> Iterator[None]:
    """Compile one graph for prompts of all lengths, whose sizes are symbolic.

    By default torch assumes that sizes equal on the first call stay equal (duck shaping); this disables that. The scale
    is a constant of the graph: inductor makes it one in the end, and would compile twice to find that out.
    """
    limits = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
    settings = {**limits, "specialize_float": True}
    with dynamo_config.patch(settings), fx_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        yield


# Compiled functions ---------------------------------------------------------------------------------------
# Prompts without segments and soft cap run the first, whose kernel has no look-up, no bias and no tanh.


@cache
def compiled() -> Compiled:
    """Attention with the prompt's rule only."""
    return Compiled(plain_attention, compile_flex)


@cache
def compiled_with_modifiers() -> Compiled:
    """Attention with a soft cap, segments or both."""
    return Compiled(attention_with_modifiers, compile_flex)


def plain_attention(q, k, v, is_bnhd, tables, mask_tensors, block_size, scale, options):
    q, k, v = heads_first((q, k, v), is_bnhd)
    lengths = (q.shape[2], k.shape[2])
    block_mask = from_tables(tables, block_size, lengths, mask_mod(*mask_tensors))
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True, kernel_options=options)


def attention_with_modifiers(q, k, v, is_bnhd, tables, mask_tensors, modifiers, block_size, scale, options):
    q, k, v = heads_first((q, k, v), is_bnhd)
    softcap, segments = modifiers
    prompt_rule = mask_mod(*mask_tensors)
    if segments is None:
        token_rule, biases = prompt_rule, []
    else:
        token_rule, biases = with_segments(prompt_rule, segments), segments.biases

    def score_mod(score, b, h, q_idx, kv_idx):
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        added = torch.zeros_like(score)
        for first, bias in biases:
            added = torch.where(kv_idx >= first, bias[h] if bias.ndim else bias, added)
        return score + added

    lengths = (q.shape[2], k.shape[2])
    block_mask = from_tables(tables, block_size, lengths, token_rule)
    return flex_attention(
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=True, kernel_options=options
    )


def heads_first(tensors, is_bnhd):
    """Each tensor as [B, H, N, D]."""
    return [x.transpose(1, 2) if flag else x for x, flag in zip(tensors, is_bnhd, strict=True)]

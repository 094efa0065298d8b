"""Attention over a keep table: the block lists and the one compiled FlexAttention call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.inputs import AttentionInputs, attend_parts
from sparse_prefill.core.logits import PLAIN, Logits, attend_rows
from sparse_prefill.core.prompt import Prompt, SubPrompt
from sparse_prefill.core.tensor_checks import check_attention_inputs, check_prompt
from sparse_prefill.core.token_mask import MaskMod, mask_mod
from sparse_prefill.kernel.block_lists import (
    BlockTables,
    Segment,
    block_tables,
    check_keep,
    check_segment,
    from_tables,
    segment_table,
)
from sparse_prefill.kernel.compiled import Compiled, count_flops
from sparse_prefill.kernel.cpu_compile import compile_flex, kernel_dtype
from sparse_prefill.kernel.not_finite import are_finite, finite, with_what_is_not_finite
from sparse_prefill.kernel.options import options_for
from sparse_prefill.record import recorder, stage

# Graphs of the one attention function in a process: dtypes x head counts and dims x block sizes x batched or not x
# scales x layouts of memory (on a GPU) x with or without a table of windows x inference mode or not.
# Past it, torch raises (the function is compiled with fullgraph=True); it never falls back to eager, which is dense.
RECOMPILE_LIMIT = 256
# Elements of keys from which on the Triton kernel, before torch 2.14, doesn't find those of late tokens where the heads
# of a token lie side by side: it counts them in 32 bits.
LEAST_UNSAFE = 1 << 31
TABLE = 1 << 27  # entries of a table, whose block lists take 4 bytes each on a GPU


@own_precision
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    *,
    prompt: Prompt,
    logits: Logits = PLAIN,
    segments: Sequence[Segment] = (),
) -> Tensor:
    """Attention over the blocks of a keep table.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        v (Tensor): values [B, Hkv, N, Dv].
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k], within ``prompt.visible()``.
        prompt (Prompt): what the tokens are.
        logits (Logits): scale, soft cap and sinks. Default: products times D ** -0.5.
        segments (Sequence[Segment]): keys and values of no token that share the softmax. Default: none.

    Returns:
        Tensor: [B, Hq, M, Dv]; rows that keep nothing are 0.

    Raises:
        ValueError: if the tensors, the table, the segments and the prompt don't fit each other.
    """
    check_attention_inputs(q, k, v)
    check_prompt(prompt, q, k)
    check_keep(keep, q, prompt)
    logits.check(q)
    for segment in segments:
        check_segment(segment, q, k, v, prompt)
    at_once = rows_at_once(prompt, q.shape[0] * q.shape[1])
    if prompt.n_q <= at_once or not prompt.is_single:
        return _attend_table(q, k, v, keep, prompt, logits, segments)
    keep = keep.expand(-1, -1, prompt.n_q, prompt.n_k)

    def attend_chunk(inputs: AttentionInputs, chunk: SubPrompt) -> Tensor:
        first = chunk.queries.start // prompt.block_size
        rows = slice(first, first + chunk.prompt.n_q)
        table = keep[:, :, rows, : chunk.prompt.n_k]
        of_rows = [replace(segment, keep=segment.keep[:, :, rows]) for segment in segments]
        return _attend_table(inputs.q, inputs.k, inputs.v, table, chunk.prompt, logits, of_rows)

    inputs = AttentionInputs(q=q, k=k, v=v, prompt=prompt, logits=logits)
    return attend_parts(inputs, prompt.chunks(at_once), attend_chunk)


def _attend_table(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, prompt: Prompt, logits: Logits, segments: Sequence[Segment]
) -> Tensor:
    keep = keep.expand(*q.shape[:2], -1, -1)
    _note_work(keep, segments, prompt.block_size)
    segments = (*segments, *_sinks(q, k, v, prompt, logits))
    with stage("table", q.device):
        tables = block_tables(keep, prompt, segments)
    with stage("kernel", q.device):
        return attend(q, k, v, tables, prompt, logits, segments)


def _note_work(keep: Tensor, segments: Sequence[Segment], block_size: int) -> None:
    """Tell a recorder that is open how many blocks each head computes, those of the segments among them."""
    if (active := recorder()) is not None:
        work = keep.sum((-2, -1))
        if segments:
            slots = segment_table(segments, block_size).unflatten(-1, (-1, block_size))
            work = work + slots.any(-1).sum((-2, -1))
        active.add_work(work)


def rows_at_once(prompt: Prompt, heads: int) -> int:
    """How many query blocks, of all heads of all rows of a batch, tables are made for at once."""
    return max(2, TABLE // (heads * prompt.n_k))


def heads_at_once(prompt: Prompt, group: int) -> int:
    """How many groups of so many heads, of all rows of a batch, tables of all query blocks are made for at once."""
    return TABLE // (group * prompt.n_q * prompt.n_k)


# A compiled function around it would otherwise compile it along with itself, for another backend.
@torch.compiler.disable(reason="sparse attention compiles its kernel by itself: compile without fullgraph=True")
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: BlockTables,
    prompt: Prompt,
    logits: Logits = PLAIN,
    segments: Sequence[Segment] = (),
) -> Tensor:
    """Run the compiled kernel over block lists made by :func:`~sparse_prefill.kernel.block_lists.block_tables`.

    Sinks are among the segments already.
    """
    if are_finite(q, k, v):
        return _run(q, k, v, tables, prompt, logits, segments)
    out = _run(q, k, finite(v), tables, prompt, logits, [replace(x, v=finite(x.v)) for x in segments])
    return with_what_is_not_finite(out, q, k, v, prompt, logits)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: BlockTables,
    prompt: Prompt,
    logits: Logits,
    segments: Sequence[Segment],
) -> Tensor:
    dtype, size, computed_in = q.dtype, prompt.block_size, kernel_dtype(q)
    scale = q.shape[-1] ** -0.5 if logits.scale is None else float(logits.scale)
    is_plain = not segments and logits.softcap is None
    options = options_for(q, v, size, is_plain=is_plain)
    count_flops("sparse_prefill.attend", lambda: _flops(tables, size, q.shape[-1] + v.shape[-1]))
    tables = BlockTables(*(x.detach() for x in tables))  # whose views they are would be compiled in
    mask_tensors = prompt.mask_tensors(q.device, q.shape[0])
    if q.device.type == "cpu" and prompt.n_q == 1:
        tables = _with_an_empty_row(tables)
    if segments:
        k = _joined(k, [segment.k for segment in segments], size)
        v = _joined(v, [segment.v for segment in segments], size)
    laid_out = [_to_kernel_layout(x.to(computed_in)) for x in (q, k, v)]
    q, k, v, turned = *(x for x, _ in laid_out), tuple(is_turned for _, is_turned in laid_out)
    with torch.no_grad(), _one_graph_for_all():
        if is_plain:
            return _compiled()(q, k, v, turned, tables, mask_tensors, size, scale, options).to(dtype)
        softcap = None if logits.softcap is None else torch.full((), logits.softcap, device=q.device)
        segment_tensors = _segment_tensors(segments, prompt) if segments else None
        modifiers = (softcap, segment_tensors)
        out = _compiled_with_modifiers()(q, k, v, turned, tables, mask_tensors, modifiers, size, scale, options)
        return out.to(dtype)


def _flops(tables: BlockTables, block_size: int, dims: int) -> int:
    """Operations of both products over the listed blocks, which are computed whole: 2 for each pair and dimension."""
    blocks = int(tables.partial_counts.sum() + tables.full_counts.sum())
    return 2 * blocks * block_size**2 * dims


def _to_kernel_layout(x: Tensor) -> tuple[Tensor, bool]:
    """x without a gradient, contiguous as [B, H, N, D] or, on a GPU, [B, N, H, D], and whether it is the latter.

    Each layout would be compiled by itself. A CPU's kernel gains more by a copy than it costs. To a GPU's kernel, steps
    between rows or heads that don't follow from sizes, and the place where a tensor begins in its memory, are numbers
    that it doesn't know to be multiples of 16 bytes: it would read keys and values two bytes at a time.
    """
    x = x.detach()
    is_turned = x.device.type != "cpu" and not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
    is_turned = is_turned and x.numel() < LEAST_UNSAFE
    x = x.transpose(1, 2) if is_turned else x
    in_place = x.is_contiguous() and x.storage_offset() == 0
    return x if in_place else x.clone(memory_format=torch.contiguous_format), is_turned


@contextmanager
def _one_graph_for_all() -> Iterator[None]:
    """Compile one graph for all lengths: every size is symbolic, and sizes that are equal aren't taken for one.

    The scale is a constant: inductor makes it one in the end, and would compile twice to find that out.
    """
    limits = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
    settings = {**limits, "specialize_float": True}
    with dynamo_config.patch(settings), fx_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        yield


def _with_an_empty_row(tables: BlockTables) -> BlockTables:
    """Lists of one row with one behind that nobody reads: a size of 1 would be compiled as a special case."""
    partial_counts, partial_indices, full_counts, full_indices = tables
    counts = (F.pad(x, (0, 1)) for x in (partial_counts, full_counts))
    indices = (F.pad(x, (0, 0, 0, 1)) for x in (partial_indices, full_indices))
    return BlockTables(*(x for pair in zip(counts, indices, strict=True) for x in pair))


@own_precision
def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, prompt: Prompt, logits: Logits = PLAIN) -> Tensor:
    """Attention over everything that the prompt allows, by SDPA where its own causality fits.

    Args, return value and errors as for :func:`block_sparse_attention`, without the table.
    """
    check_attention_inputs(q, k, v)
    check_prompt(prompt, q, k)
    logits.check(q)
    if prompt.is_causal and prompt.q_len in (1, prompt.kv_len) and logits.are_plain:
        sdpa = partial(F.scaled_dot_product_attention, is_causal=prompt.q_len > 1, scale=logits.scale, enable_gqa=True)
        out = sdpa(q, k, v)
        # An output that is finite tells of finite keys, too, at less than a look through the cache of a decode step.
        return out if are_finite(q, out) else with_what_is_not_finite(sdpa(q, k, finite(v)), q, k, v, prompt, logits)
    if prompt.q_len == 1 or prompt.n_k == 1:
        rows, keys = prompt.query_positions(q.device), torch.arange(prompt.kv_len, device=q.device)
        allowed = prompt.may_attend(rows, keys)
        out = attend_rows(q, k, v, allowed, logits)
        if are_finite(q, out):
            return out
        k_in_sight = k.masked_fill(~allowed.any(2)[..., None], 0)  # SDPA adds to the logits of the others
        return with_what_is_not_finite(attend_rows(q, k_in_sight, finite(v), allowed, logits), q, k, v, prompt, logits)
    # A chunk, padding, a window: SDPA would need an M x N mask.
    segments = _sinks(q, k, v, prompt, logits)
    everything = prompt.visible(q.device).expand(*q.shape[:2], -1, -1)
    return attend(q, k, v, block_tables(everything, prompt, segments), prompt, logits, segments)


def _sinks(q: Tensor, k: Tensor, v: Tensor, prompt: Prompt, logits: Logits) -> tuple[Segment, ...]:
    """Sinks as one key without direction and value, whose logit is its bias alone."""
    if logits.sinks is None:
        return ()
    keep = prompt.visible(q.device).any(-1, keepdim=True)
    shape = (*k.shape[:2], 1)
    return (
        Segment(k=k.new_zeros(*shape, k.shape[3]), v=v.new_zeros(*shape, v.shape[3]), keep=keep, bias=logits.sinks),
    )


@cache
def _compiled() -> Compiled:
    return Compiled(_attend, compile_flex)


def _attend(q, k, v, turned, tables, mask_tensors, block_size, scale, options):
    q, k, v = _heads_first((q, k, v), turned)
    lengths = (q.shape[2], k.shape[2])
    block_mask = from_tables(tables, block_size, lengths, mask_mod(*mask_tensors))
    return flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True, kernel_options=options)


def _heads_first(tensors, turned):
    return [x.transpose(1, 2) if is_turned else x for x, is_turned in zip(tensors, turned, strict=True)]


# Segments are more columns for the same softmax, and a soft cap bends its logits. Prompts with neither run the function
# above, with no look-up, no bias and no tanh.


LEAST_SLOTS = 1 << 20  # 1 MB, with room for the sinks of 1M tokens


class SegmentTensors(NamedTuple):
    """What the token-level rules of the segments capture.

    Shapes: first_slot int32 [], the first key behind the prompt's blocks; size_log2 int32 [], of the block size; table
    bool [slots], flat; strides of its batch, head and query block, int32 [] each (int64 for over 2^31 slots); biases of
    the segments with the first key of each, int32 [] and fp32 [] or, where each head has its own, [heads or more].
    Whole numbers are as short as a GPU's kernel takes positions: longer ones would take twice the registers.
    """

    first_slot: Tensor
    size_log2: Tensor  # on a GPU, torch (2.11 to 2.14) can't spell a division by a symbolic size, but a shift
    table: Tensor
    strides: tuple[Tensor, Tensor, Tensor]
    biases: tuple[tuple[Tensor, Tensor], ...]


def _segment_tensors(segments: Sequence[Segment], prompt: Prompt) -> SegmentTensors:
    size, device = prompt.block_size, segments[0].k.device

    def scalar(value: float, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full((), value, dtype=dtype, device=device)  # torch.tensor would wait for a GPU

    table = segment_table(segments, size)  # [B or 1, Hq or 1, n_q, slots]
    batch_stride, head_stride, row_stride, _ = table.stride()
    index = torch.int32 if table.numel() < 2**31 else torch.int64
    strides = (
        scalar(batch_stride if table.shape[0] > 1 else 0, index),
        scalar(head_stride if table.shape[1] > 1 else 0, index),
        scalar(row_stride, index),
    )
    # A kernel's tile may look at rows behind the last query block, and torch 2.13 can't spell a look-up in a table of
    # symbolic size on the CPU: as in Prompt, the sizes are constants, few of them as they are powers of two.
    tiles = max(1, 128 // size)
    length = max(LEAST_SLOTS, 1 << (table.numel() + tiles * row_stride).bit_length())
    flat = F.pad(table.flatten(), (0, length - table.numel()))
    torch._dynamo.mark_static(flat)

    start, biases = prompt.n_k * size, []
    for segment in segments:
        biases.append((scalar(start), _bias(segment, scalar)))
        start += -(-segment.k.shape[2] // size) * size
    return SegmentTensors(biases[0][0], scalar(size.bit_length() - 1), flat, strides, tuple(biases))


def _bias(segment: Segment, scalar: Callable[[float, torch.dtype], Tensor]) -> Tensor:
    if not isinstance(segment.bias, Tensor):
        return scalar(segment.bias, torch.float32)
    bias = segment.bias.float()
    bias = F.pad(bias, (0, max(64, 1 << (len(bias) - 1).bit_length()) - len(bias)))  # a constant size, as above
    torch._dynamo.mark_static(bias)
    return bias


def _joined(x: Tensor, parts: Sequence[Tensor], block_size: int) -> Tensor:
    """x [B, H, N, D] and parts [B, H, S, D] behind it, each filled up to whole blocks with zeros."""
    return torch.cat([F.pad(part, (0, 0, 0, -part.shape[2] % block_size)) for part in (x, *parts)], dim=2)


@cache
def _compiled_with_modifiers() -> Compiled:
    return Compiled(_attend_with_modifiers, compile_flex)


def _attend_with_modifiers(q, k, v, turned, tables, mask_tensors, modifiers, block_size, scale, options):
    q, k, v = _heads_first((q, k, v), turned)
    softcap, segment_tensors = modifiers
    of_prompt = mask_mod(*mask_tensors)
    if segment_tensors is None:
        token_rule, biases = of_prompt, []
    else:
        token_rule, biases = _with_segments(of_prompt, segment_tensors), segment_tensors.biases

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


def _with_segments(of_prompt: MaskMod, segment_tensors: SegmentTensors) -> MaskMod:
    """The rule of a prompt, and behind its keys that of the segments."""
    first_slot, size_log2, table, (batch_stride, head_stride, row_stride), _ = segment_tensors

    def token_rule(b, h, q_idx, kv_idx):
        slot = (kv_idx - first_slot).clamp(min=0)
        row = q_idx >> size_log2
        kept = table[b * batch_stride + h * head_stride + row * row_stride + slot]
        return torch.where(kv_idx < first_slot, of_prompt(b, h, q_idx, kv_idx), kept)

    return token_rule

"""Sparse attention over a keep table, in chunks of rows where its block lists would be too large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.inputs import AttentionInputs, attend_parts
from sparse_prefill.core.logits import PLAIN, Logits
from sparse_prefill.core.prompt import Prompt, SubPrompt
from sparse_prefill.core.tensor_checks import check_attention_inputs, check_prompt
from sparse_prefill.kernel.block_lists import block_tables, check_keep
from sparse_prefill.kernel.flex import attend
from sparse_prefill.kernel.segments import Segment, check_segment, segment_table, sink_segments
from sparse_prefill.record import recorder, stage

MAX_TABLE_ENTRIES = 1 << 27  # of all heads; block lists take 4 bytes for each entry on a GPU


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
        prompt (Prompt): lengths, padding, documents and window of the tokens.
        logits (Logits): scale, soft cap and sinks. Default: products times D ** -0.5.
        segments (Sequence[Segment]): further keys and values, of no token, that share the softmax. Default: none.

    Returns:
        Tensor: [B, Hq, M, Dv]; rows without a kept block are 0.

    Raises:
        ValueError: if the tensors, the table, the segments and the prompt don't fit each other.
    """
    check_attention_inputs(q, k, v)
    check_prompt(prompt, q, k)
    check_keep(keep, q, prompt)
    logits.check(q)
    inputs = AttentionInputs(q=q, k=k, v=v, prompt=prompt, logits=logits)
    for segment in segments:
        check_segment(segment, inputs)
    at_once = rows_at_once(prompt, q.shape[0] * q.shape[1])
    if prompt.n_q <= at_once or not prompt.is_single:
        return _attend_blocks(inputs, keep, segments)
    keep = keep.expand(-1, -1, prompt.n_q, prompt.n_k)

    def attend_chunk(chunk_inputs: AttentionInputs, chunk: SubPrompt) -> Tensor:
        first = chunk.queries.start // prompt.block_size
        rows = slice(first, first + chunk.prompt.n_q)
        chunk_segments = [replace(segment, keep=segment.keep[:, :, rows]) for segment in segments]
        return _attend_blocks(chunk_inputs, keep[:, :, rows, : chunk.prompt.n_k], chunk_segments)

    return attend_parts(inputs, prompt.chunks(at_once), attend_chunk)


def _attend_blocks(inputs: AttentionInputs, keep: Tensor, segments: Sequence[Segment]) -> Tensor:
    q, prompt = inputs.q, inputs.prompt
    keep = keep.expand(*q.shape[:2], -1, -1)
    _record_work(keep, segments, prompt.block_size)
    segments = (*segments, *sink_segments(inputs))
    with stage("table", q.device):
        tables = block_tables(keep, prompt, segments)
    with stage("kernel", q.device):
        return attend(inputs, tables, segments)


def _record_work(keep: Tensor, segments: Sequence[Segment], block_size: int) -> None:
    """Add the number of blocks that each head computes, including those of segments, to an open recorder."""
    if (active := recorder()) is not None:
        work = keep.sum((-2, -1))
        if segments:
            slots = segment_table(segments, block_size).unflatten(-1, (-1, block_size))
            work = work + slots.any(-1).sum((-2, -1))
        active.add_work(work)


def rows_at_once(prompt: Prompt, heads: int) -> int:
    """Query blocks in a chunk whose table, of all heads of the whole batch, has at most :data:`MAX_TABLE_ENTRIES`."""
    return max(2, MAX_TABLE_ENTRIES // (heads * prompt.n_k))


def heads_at_once(prompt: Prompt, group: int) -> int:
    """Groups of ``group`` heads whose table, of all query blocks, has at most :data:`MAX_TABLE_ENTRIES`."""
    return MAX_TABLE_ENTRIES // (group * prompt.n_q * prompt.n_k)

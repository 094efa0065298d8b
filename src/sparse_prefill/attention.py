"""Sparse attention: a strategy's keep table, and attention over what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.key_state import KeyState
from sparse_prefill.core.logits import Logits
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_attention_inputs
from sparse_prefill.cuda_graphs import open_graphs
from sparse_prefill.kernel.block_sparse import heads_at_once, rows_at_once
from sparse_prefill.record import Recorder, SparseCallTensors, recorder, stage
from sparse_prefill.strategy import Strategy, get_strategy


@own_precision
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strategy: Strategy | str = "flex_prefill",
    *,
    prompt: Prompt | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    state: KeyState | None = None,
) -> Tensor:
    """Causal attention over the blocks that a strategy keeps.

    The queries are the last M of the N tokens. Each row of a padded batch and each packed document is a prompt of its
    own, selected for and attended separately. Decoding (up to ``max_decode_queries`` queries after a prefix), a prompt
    or a window shorter than the strategy's ``min_length``, and a prompt that fits one block run dense;
    :func:`~sparse_prefill.record` says which. Under ``torch.autocast``, q, k and v are cast to its dtype.

    Prompts whose tables would take more than half a gigabyte, such as 512K tokens with 32 heads in blocks of 128, are
    attended in parts: in chunks of rows, which are recorded as chunks, if their strategy selects for these what it
    selects for the whole, and else some key heads with their query heads at a time, unless it looks at all heads
    together.

    Args:
        q (Tensor): queries [B, Hq, M, D], fp32, bf16 or fp16.
        k (Tensor): keys [B, Hkv, N, D], Hkv dividing Hq and N >= M.
        v (Tensor): values [B, Hkv, N, Dv].
        strategy (Strategy | str): a strategy, or the name of one for its defaults. Default: "flex_prefill".
        prompt (Prompt | None): chunk, padding, documents or window. Default: one causal prompt of these lengths.
        scale (float | None): factor of the logits. Default: D ** -0.5.
        softcap (float | None): logits become softcap * tanh(logits / softcap). Strategies select by the logits before
            it. Default: None.
        sinks (Tensor | None): one more logit per query head that takes a share of the softmax, [Hq]. Default: None.
        state (KeyState | None): what is remembered of one layer's keys from chunk to chunk. Default: nothing.

    Returns:
        Tensor: [B, Hq, M, Dv]; rows of padding are 0.

    Raises:
        ValueError: if shapes, dtypes or devices don't fit, gradients are asked for, ``scale`` or ``softcap`` is no
            positive number, or the strategy can't honour the prompt.

    Example:
        >>> q, k, v = torch.randn(1, 8, 4096, 64), torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64)
        >>> out = sparse_attention(q, k, v, "flex_prefill")
    """
    if isinstance(strategy, str):
        strategy = get_strategy(strategy)
    check_attention_inputs(q, k, v)
    logits = Logits(scale=scale, softcap=softcap, sinks=sinks)
    inputs = AttentionInputs(q=q, k=k, v=v, prompt=strategy.prompt_for(q, k, prompt), logits=logits)
    graphs = open_graphs()
    attend = _attend_in_parts if graphs is None else partial(graphs.attend, _attend_in_parts)
    if inputs.prompt.is_single or inputs.prompt.q_len == 1:
        return attend(inputs, strategy, state)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for rows, queries, keys, alone in inputs.prompt.split_sequences():
        own = None if state is None else state.part((rows.start, keys.start))
        out[rows, :, queries] = attend(inputs.of_tokens(rows, queries, keys, alone), strategy, own)
    return out


def _attend_in_parts(inputs: AttentionInputs, strategy: Strategy, state: KeyState | None) -> Tensor:
    """One prompt; where the tables of all would be too large, in chunks of rows or some heads at a time.

    In chunks where the strategy selects the same for them, by heads where it tells these apart, else in one piece.
    """
    state = KeyState() if state is None else state
    q, prompt = inputs.q, inputs.prompt
    at_once = rows_at_once(prompt, q.shape[0] * q.shape[1])
    if prompt.n_q > at_once and strategy.dense_reason(prompt, q.device) is None:
        if strategy.chunk_invariant:
            return _attend_in_chunks(inputs, strategy, state, at_once)
        if parts := _head_parts(strategy, inputs):
            return _attend_by_heads(inputs, strategy, state, parts)
    return _attend(inputs.with_prompt(prompt.with_state(state.for_call())), strategy)


def _attend_in_chunks(inputs: AttentionInputs, strategy: Strategy, state: KeyState, at_once: int) -> Tensor:
    out = inputs.q.new_empty(*inputs.q.shape[:3], inputs.v.shape[3])
    for rows, queries, keys, chunk in inputs.prompt.chunks(at_once):
        of_chunk = inputs.of_tokens(rows, queries, keys, chunk.with_state(state.for_call()))
        out[:, :, queries] = _attend(of_chunk, strategy)
    return out


class _HeadPart(NamedTuple):
    strategy: Strategy
    heads: slice
    key_heads: slice


def _head_parts(strategy: Strategy, inputs: AttentionInputs) -> list[_HeadPart]:
    """As many key heads at a time as tables are made for at once, with their query heads; none if they can't be.

    All parts have the same number of heads, since each number would be compiled.
    """
    batch, heads, key_heads = *inputs.q.shape[:2], inputs.k.shape[1]
    group = heads // key_heads
    step = max(1, min(heads_at_once(inputs.prompt, batch * group), key_heads))
    while key_heads % step:
        step -= 1
    parts = []
    for first in range(0, key_heads, step):
        of_keys = slice(first, first + step)
        of_queries = slice(of_keys.start * group, of_keys.stop * group)
        own = strategy.for_heads(of_queries, of_keys)
        if own is None:
            return []
        parts.append(_HeadPart(own, of_queries, of_keys))
    return parts if len(parts) > 1 else []


def _attend_by_heads(
    inputs: AttentionInputs, strategy: Strategy, state: KeyState, parts: Sequence[_HeadPart]
) -> Tensor:
    """Attention of some heads after the other. Only a recorder, which is told of one call, holds the table of all."""
    active = _begin_record()
    out, keeps, work = inputs.q.new_empty(*inputs.q.shape[:3], inputs.v.shape[3]), [], []
    for own, heads, key_heads in parts:
        shown = inputs.prompt.with_state(state.part(("heads", key_heads.start, key_heads.stop)).for_call())
        of_part = inputs.of_heads(heads, key_heads, shown)
        keep = own.keep(of_part.scored_q, of_part.scored_k, shown)
        out[:, heads] = own.attend(of_part, keep)
        if active:
            keeps.append(keep.expand(-1, heads.stop - heads.start, -1, -1))
            work.append(active.take_work(of_part.q, keep))
    if active:
        active.work = torch.cat(work, dim=1)
        active.add_sparse(strategy.label, inputs.prompt, _seen(inputs, out, torch.cat(keeps, dim=1)))
    return out


def _attend(inputs: AttentionInputs, strategy: Strategy) -> Tensor:
    """One prompt, or a batch of prompts of one length."""
    active = _begin_record()
    prompt, device = inputs.prompt, inputs.q.device
    reason = strategy.dense_reason(prompt, device)
    if reason is not None:
        with stage("kernel", device):
            out = strategy.attend_dense(inputs)
        if active:
            active.add_dense(strategy.label, prompt, reason)
        return out
    keep = strategy.keep(inputs.scored_q, inputs.scored_k, prompt)
    out = strategy.attend(inputs, keep)
    if active:
        active.add_sparse(strategy.label, prompt, _seen(inputs, out, keep))
    return out


def _seen(inputs: AttentionInputs, out: Tensor, keep: Tensor) -> SparseCallTensors:
    return SparseCallTensors(inputs.scored_q, inputs.scored_k, inputs.v, out, keep, replace(inputs.logits, scale=None))


def _begin_record() -> Recorder | None:
    """The recorder that is open. Stages of a failed call, or of a strategy called by itself, belong to no entry."""
    active = recorder()
    if active:
        active.begin()
    return active

"""Sparse attention: a strategy selects blocks, and the kernel attends to them.

The functions follow a call from top to bottom: a batch, one sequence, a group of heads, one call of the strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.inputs import AttentionInputs, attend_parts
from sparse_prefill.core.key_state import KeyState
from sparse_prefill.core.logits import Logits
from sparse_prefill.core.prompt import Prompt, SubPrompt
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

    The queries are the last M of the N tokens. Each row of a padded batch and each packed document is a separate
    prompt. Three kinds of calls run dense, and :func:`~sparse_prefill.record` reports them: decoding (up to
    ``max_decode_queries`` queries after a prefix), a prompt or a window shorter than the strategy's ``min_length``, and
    a prompt of one block. Under ``torch.autocast``, q, k and v are cast to its dtype.

    Long prompts, whose tables would take more than half a gigabyte, are attended in parts. 512K tokens with 32 heads in
    blocks of 128 are one. If the strategy is ``chunk_invariant``, the parts are chunks of rows, and each is recorded as
    a call. Else they are groups of key heads with their query heads, if the strategy can select for these separately.

    Args:
        q (Tensor): queries [B, Hq, M, D], fp32, bf16 or fp16.
        k (Tensor): keys [B, Hkv, N, D], Hkv dividing Hq and N >= M.
        v (Tensor): values [B, Hkv, N, Dv].
        strategy (Strategy | str): a strategy, or the name of one for its defaults. Default: "flex_prefill".
        prompt (Prompt | None): chunk, padding, documents or window. Default: a causal prompt of these lengths.
        scale (float | None): factor of the logits. Default: D ** -0.5.
        softcap (float | None): logits become softcap * tanh(logits / softcap). Strategies select by the logits without
            it. Default: None.
        sinks (Tensor | None): one more logit per query head that takes a share of the softmax, [Hq]. Default: None.
        state (KeyState | None): statistics of one layer's keys, kept from chunk to chunk. Default: None.

    Returns:
        Tensor: [B, Hq, M, Dv]; rows of padding are 0.

    Raises:
        ValueError: if shapes, dtypes or devices don't fit each other, an input requires gradients, ``scale`` or
            ``softcap`` isn't a positive number, or the strategy doesn't support the prompt.

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
    attend = _attend_sequence if graphs is None else partial(graphs.attend, _attend_sequence)
    if inputs.prompt.is_single or inputs.prompt.q_len == 1:
        return attend(inputs, strategy, state)

    def attend_sequence(of_sequence: AttentionInputs, sequence: SubPrompt) -> Tensor:
        own = None if state is None else state.part((sequence.rows.start, sequence.keys.start))
        return attend(of_sequence, strategy, own)

    return attend_parts(inputs, inputs.prompt.split_sequences(), attend_sequence)


def _attend_sequence(inputs: AttentionInputs, strategy: Strategy, state: KeyState | None) -> Tensor:
    """One prompt, or a batch of prompts of one length: at once, in chunks of rows, or in groups of heads."""
    state = KeyState() if state is None else state
    prompt = inputs.prompt
    max_rows = rows_at_once(prompt, inputs.q.shape[0] * inputs.q.shape[1])
    if prompt.n_q > max_rows and strategy.dense_reason(prompt, inputs.q.device) is None:
        if strategy.chunk_invariant:
            return attend_parts(inputs, prompt.chunks(max_rows), lambda chunk, _: _attend(chunk, strategy, state))
        if groups := _head_groups(strategy, inputs):
            return _attend_by_heads(inputs, strategy, state, groups)
    return _attend(inputs, strategy, state)


class _HeadGroup(NamedTuple):
    strategy: Strategy
    heads: slice
    key_heads: slice


def _head_groups(strategy: Strategy, inputs: AttentionInputs) -> list[_HeadGroup]:
    """Groups of key heads with their query heads, as large as one table allows; none if they can't be separated.

    All groups have the same number of heads, since each number is compiled separately.
    """
    batch, heads, key_heads = *inputs.q.shape[:2], inputs.k.shape[1]
    per_key_head = heads // key_heads
    step = max(1, min(heads_at_once(inputs.prompt, batch * per_key_head), key_heads))
    while key_heads % step:
        step -= 1
    groups = []
    for first in range(0, key_heads, step):
        of_keys = slice(first, first + step)
        of_queries = slice(of_keys.start * per_key_head, of_keys.stop * per_key_head)
        own = strategy.for_heads(of_queries, of_keys)
        if own is None:
            return []
        groups.append(_HeadGroup(own, of_queries, of_keys))
    return groups if len(groups) > 1 else []


def _attend_by_heads(
    inputs: AttentionInputs, strategy: Strategy, state: KeyState, groups: Sequence[_HeadGroup]
) -> Tensor:
    """Attention of one group of heads after the other, recorded as one call.

    The table of all heads is built only for a recorder.
    """
    active = _begin_record()
    out, keeps, work = inputs.q.new_empty(*inputs.q.shape[:3], inputs.v.shape[3]), [], []
    for own, heads, key_heads in groups:
        own_state = state.part(("heads", key_heads.start, key_heads.stop)).for_call()
        of_group = inputs.of_heads(heads, key_heads, inputs.prompt.with_state(own_state))
        keep = own.keep(of_group.scored_q, of_group.scored_k, of_group.prompt)
        out[:, heads] = own.attend(of_group, keep)
        if active:
            keeps.append(keep.expand(-1, heads.stop - heads.start, -1, -1))
            work.append(active.take_work(of_group.q, keep))
    if active:
        active.work = torch.cat(work, dim=1)
        active.add_sparse(strategy.label, inputs.prompt, _call_tensors(inputs, out, torch.cat(keeps, dim=1)))
    return out


def _attend(inputs: AttentionInputs, strategy: Strategy, state: KeyState) -> Tensor:
    """One call of the strategy: dense if it gives a reason, else its keep table and attention over that."""
    inputs = inputs.with_prompt(inputs.prompt.with_state(state.for_call()))
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
        active.add_sparse(strategy.label, prompt, _call_tensors(inputs, out, keep))
    return out


def _call_tensors(inputs: AttentionInputs, out: Tensor, keep: Tensor) -> SparseCallTensors:
    return SparseCallTensors(inputs.scored_q, inputs.scored_k, inputs.v, out, keep, replace(inputs.logits, scale=None))


def _begin_record() -> Recorder | None:
    """The open recorder, cleared of stages of a failed call or of a strategy that was called directly."""
    active = recorder()
    if active:
        active.begin()
    return active

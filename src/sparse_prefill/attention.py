"""Sparse attention: a strategy's keep table, and attention over what it keeps."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from sparse_prefill.kernel import dense_attention, rows_at_once
from sparse_prefill.key_state import KeyState
from sparse_prefill.logits import Logits
from sparse_prefill.prompt import Prompt
from sparse_prefill.record import Seen, recorder, stage
from sparse_prefill.strategy import Strategy, get_strategy
from sparse_prefill.validation import check_attention_inputs


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
    own, selected for and attended as if it were alone. A single query (decode), a prompt or a window under the
    strategy's ``min_length`` and one that fits one block are computed densely instead;
    :func:`~sparse_prefill.record` tells. Prompts whose tables would take more than half a gigabyte, such as 512K tokens
    with 32 heads in blocks of 128, are attended in chunks of rows, and recorded as chunks if their strategy selects for
    chunks what it selects for the whole.

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
    prompt = strategy.prompt_for(q, k, prompt)
    if prompt.is_single or prompt.q_len == 1:
        return _attend_in_chunks(q, k, v, strategy, prompt, logits, state)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for rows, queries, keys, alone in prompt.pieces():
        own = None if state is None else state.part((rows.start, keys.start))
        of_piece = q[rows, :, queries], k[rows, :, keys], v[rows, :, keys]
        out[rows, :, queries] = _attend_in_chunks(*of_piece, strategy, alone, logits, own)
    return out


def _attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, strategy: Strategy, prompt: Prompt, logits: Logits, state: KeyState | None
) -> Tensor:
    """One prompt, in chunks of rows where the tables of all would be too large and the strategy selects the same."""
    state = KeyState() if state is None else state
    at_once = rows_at_once(prompt, q.shape[0] * q.shape[1])
    if prompt.n_q <= at_once or not strategy.chunk_invariant or strategy.dense_reason(prompt) is not None:
        return _attend(q, k, v, strategy, prompt.with_state(state.for_call()), logits)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for _, queries, keys, chunk in prompt.chunks(at_once):
        of_chunk = q[:, :, queries], k[:, :, keys], v[:, :, keys]
        out[:, :, queries] = _attend(*of_chunk, strategy, chunk.with_state(state.for_call()), logits)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, strategy: Strategy, prompt: Prompt, logits: Logits) -> Tensor:
    """One prompt, or a batch of prompts of one length."""
    if active := recorder():
        active.seconds = {}  # stages of a failed call, or of a strategy called by itself, belong to no entry
    reason = strategy.dense_reason(prompt)
    if reason is not None:
        with stage("kernel", q.device):
            out = dense_attention(q, k, v, prompt=prompt, logits=logits)
        if active := recorder():
            active.add_dense(strategy.label, prompt, reason)
        return out
    # Strategies score with the usual scale, so another one goes into the queries that they see.
    scored = q if logits.scale is None else q * (logits.scale * q.shape[-1] ** 0.5)
    keep = strategy.keep(scored, k, prompt)
    out = strategy.attend(q, k, v, keep, prompt=prompt, logits=logits)
    if active := recorder():
        active.add_sparse(strategy.label, prompt, Seen(scored, k, v, out, keep, replace(logits, scale=None)))
    return out

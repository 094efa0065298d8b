"""Sparse attention: a strategy's keep table, its block lists, and the one compiled FlexAttention call."""

from __future__ import annotations

from functools import cache

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as fx_config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from sparse_prefill.block_mask import BlockTables, block_tables, check_keep, from_tables
from sparse_prefill.prompt import Prompt, mask_mod
from sparse_prefill.record import recorder, stage
from sparse_prefill.strategy import Strategy, get_strategy
from sparse_prefill.validation import check_attention_inputs, check_prompt

# Graphs of the one attention function in a process: dtypes x head dims x block sizes x batched or not x grad modes.
# Past it, torch raises (the function is compiled with fullgraph=True); it never falls back to eager, which is dense.
RECOMPILE_LIMIT = 256
DISTINCT_SIZES = {"use_duck_shape": False}


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strategy: Strategy | str = "flex_prefill",
    *,
    prompt: Prompt | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention over the blocks that a strategy keeps.

    The queries are the last M of the N tokens. A single query (decode), a prompt under the strategy's
    ``min_length`` and one that fits one block are computed densely instead; :func:`~sparse_prefill.record` tells.

    Args:
        q (Tensor): queries [B, Hq, M, D], fp32, bf16 or fp16.
        k (Tensor): keys [B, Hkv, N, D], Hkv dividing Hq and N >= M.
        v (Tensor): values [B, Hkv, N, Dv].
        strategy (Strategy | str): a strategy, or the name of one for its defaults. Default: "flex_prefill".
        prompt (Prompt | None): chunk, padding or documents. Default: one causal prompt of these lengths.
        scale (float | None): factor of the logits. Default: D ** -0.5.

    Returns:
        Tensor: [B, Hq, M, Dv]; rows of padding are 0.

    Raises:
        ValueError: if shapes, dtypes or devices don't fit, gradients are asked for, ``scale`` is no positive
            number, or the strategy can't honour the prompt.

    Example:
        >>> q, k, v = torch.randn(1, 8, 4096, 64), torch.randn(1, 2, 4096, 64), torch.randn(1, 2, 4096, 64)
        >>> out = sparse_attention(q, k, v, "flex_prefill")
    """
    if isinstance(strategy, str):
        strategy = get_strategy(strategy)
    check_attention_inputs(q, k, v)
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number, got {scale!r}.")
    prompt = strategy.prompt_for(q, k, prompt)
    if active := recorder():
        active.seconds = {}  # stages of a failed call, or of a strategy called by itself, belong to no entry
    reason = strategy.dense_reason(prompt)
    if reason is not None:
        with stage("kernel", q.device):
            out = dense_attention(q, k, v, prompt=prompt, scale=scale)
        if active := recorder():
            active.add_dense(strategy.name, prompt, reason)
        return out
    # Strategies score with the usual scale, so another one goes into the queries that they see.
    scored = q if scale is None else q * (scale * q.shape[-1] ** 0.5)
    keep = strategy.keep(scored, k, prompt)
    out = block_sparse_attention(q, k, v, keep, prompt=prompt, scale=scale)
    if active := recorder():
        active.add_sparse(strategy.name, prompt, scored, k, keep)
    return out


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, prompt: Prompt, scale: float | None = None
) -> Tensor:
    """Attention over the blocks of a keep table.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        v (Tensor): values [B, Hkv, N, Dv].
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k], within ``prompt.visible()``.
        prompt (Prompt): what the tokens are.
        scale (float | None): factor of the logits. Default: D ** -0.5.

    Returns:
        Tensor: [B, Hq, M, Dv]; rows that keep nothing are 0.

    Raises:
        ValueError: if the tensors, the table and the prompt don't fit each other.
    """
    check_attention_inputs(q, k, v)
    check_prompt(prompt, q, k)
    check_keep(keep, q, prompt)
    with stage("table", q.device):
        tables = block_tables(keep, prompt)
    with stage("kernel", q.device):
        return attend(q, k, v, tables, prompt, scale)


def attend(q: Tensor, k: Tensor, v: Tensor, tables: BlockTables, prompt: Prompt, scale: float | None = None) -> Tensor:
    """Run the compiled kernel over block lists made by :func:`~sparse_prefill.block_mask.block_tables`."""
    # Under no_grad a leaf may still ask for gradients, which the CPU kernel takes for a call that needs a backward.
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()
    limit = RECOMPILE_LIMIT
    # One graph for all lengths: every size is symbolic, and sizes that happen to be equal aren't taken for one.
    limits = {"recompile_limit": limit, "accumulated_recompile_limit": limit}
    with dynamo_config.patch(limits), fx_config.patch(DISTINCT_SIZES):  # type: ignore[attr-defined]
        mask_tensors = prompt.mask_tensors(q.device, q.shape[0])
        return _compiled()(q, k, v, tables, mask_tensors, prompt.block_size, scale)


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

"""Attention over a keep table: the block lists and the one compiled FlexAttention call."""

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
from sparse_prefill.record import stage
from sparse_prefill.validation import check_attention_inputs, check_prompt

# Graphs of the one attention function in a process: dtypes x head dims x block sizes x batched or not x grad modes.
# Past it, torch raises (the function is compiled with fullgraph=True); it never falls back to eager, which is dense.
RECOMPILE_LIMIT = 256
DISTINCT_SIZES = {"use_duck_shape": False}


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

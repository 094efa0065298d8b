"""Exact attention of some queries, summed over blocks of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.block_shares import LOG2_E, block_shares
from sparse_prefill.estimators.pooled import MAX_LOGITS_CPU, MAX_LOGITS_GPU, group_logits
from sparse_prefill.kernel.cpu_compile import kernel_dtype

MIN_ROWS = 128  # of a matrix product: a product of fewer rows would spend its time on reading keys


def attention_mass(
    q: Tensor, k: Tensor, allowed: Tensor, block_size: int, scale: float | None = None, *, rounded: bool = False
) -> Tensor:
    """Share of each query's attention that each block of keys receives.

    With C_j the keys of block j, and the softmax over the keys that query r may attend to:

        mass[r, j] = sum over c in C_j of softmax_c(scale * q_r . k_c)

    Logits are computed for some queries and key heads at a time, so that no table of tokens by tokens is stored.
    Scratch memory is 2^21 fp32 logits on a CPU and 2^28 elsewhere, or B x 128 x N if that is more. A CPU also holds an
    fp32 copy of the keys of these heads or, with ``rounded``, copies of these keys and logits in the inputs' dtype.

    Args:
        q (Tensor): queries [B, Hq, m, D].
        k (Tensor): keys [B, Hkv, N, D].
        allowed (Tensor): which pairs may attend, bool [B or 1, 1, m, l], for the last l keys. All queries attend to all
            keys before them.
        block_size (int): tokens in a block.
        scale (float | None): factor of the products. Default: D ** -0.5.
        rounded (bool): whether a CPU multiplies the inputs in their own dtype, which rounds the logits: see
            :func:`center_keys`. Default: False.

    Returns:
        Tensor: fp32 [B, Hq, m, ceil(N / block_size)]. Each row sums to 1, or to 0 if its query may attend to no key.
    """
    (batch, heads, rows, dim), (key_heads, tokens) = q.shape, k.shape[1:3]
    group, scale = heads // key_heads, LOG2_E * (dim**-0.5 if scale is None else scale)
    budget = (MAX_LOGITS_CPU if q.device.type == "cpu" else MAX_LOGITS_GPU) // (batch * group * tokens)
    heads_at_once, rows_at_once = max(1, budget // rows), max(-(-MIN_ROWS // group), budget)
    mass = torch.empty(batch, heads, rows, -(-tokens // block_size), device=q.device)
    for h in range(0, key_heads, heads_at_once):
        keys = k[:, h : h + heads_at_once]
        if q.device.type == "cpu":  # keys that aren't contiguous, as in models, cost the product more than a copy does
            keys = (keys if rounded else keys.float()).contiguous()
        of = slice(h * group, (h + heads_at_once) * group)
        for r in range(0, rows, rows_at_once):
            part = slice(r, r + rows_at_once)
            logits, rest = group_logits(q[:, of, part], keys, scale, rounded=rounded)
            if allowed.shape[-1]:
                logits[..., -allowed.shape[-1] :].masked_fill_(~allowed[:, :, part], -torch.inf)
            mass[:, of, part] = block_shares(logits, block_size, rest)
    return mass


def center_keys(q: Tensor, k: Tensor, prompt: Prompt, first: int) -> tuple[Tensor, bool]:
    """Keys that an estimate multiplies queries with, and whether the CPU may round the products to bf16.

    A CPU that multiplies bf16 takes half the time for bf16 products, but PyTorch returns these only in bf16. Rounding
    is coarse where logits are large. So the mean of the first keys is subtracted from all keys: this moves all logits
    of a query by the same amount, which leaves its softmax as it is, and in real models makes logits small.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        prompt (Prompt): lengths and padding of the tokens. With left padding, nothing is rounded.
        first (int): number of first keys whose mean is subtracted, the same for all chunks of a prompt.

    Returns:
        tuple[Tensor, bool]: keys [B, Hkv, N, D], to be used only in a softmax over their products with q, and whether
        to round.
    """
    if q.device.type != "cpu" or kernel_dtype(q) != torch.bfloat16 or prompt.left_padding is not None:
        return k, False
    return k - k[:, :, :first].mean(2, keepdim=True), True


def gpu_query_blocks(logits: int, n_q: int) -> int:
    """How many of ``n_q`` query blocks, with this many ``logits`` each, an estimate computes at once on a GPU.

    Few blocks at once leave the GPU waiting for launches. Many blocks at once compute more masked logits, as all of
    them see the keys before the last row. A quarter of the blocks is a compromise.
    """
    return max(1, min(MAX_LOGITS_GPU // max(1, logits), max(8, n_q // 4)))

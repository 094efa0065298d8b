"""True attention probabilities of some queries, summed over blocks of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.block_shares import LOG2_E, block_shares
from sparse_prefill.estimators.pooled import MAX_LOGITS_CPU, MAX_LOGITS_GPU, group_logits
from sparse_prefill.kernel.cpu_compile import kernel_dtype

# No fewer than those of 128 rows of a product are held at once, which would spend its time on reading keys.
ROWS = 128


def attention_mass(
    q: Tensor, k: Tensor, allowed: Tensor, block_size: int, scale: float | None = None, *, rounded: bool = False
) -> Tensor:
    """Share of each query's attention that falls on each block of keys.

    Logits are made and summed up some queries and key heads at a time, so that no table of tokens by tokens is stored:
    scratch memory is 2^21 fp32 logits on a CPU and 2^28 elsewhere, or B x 128 x N if these are more, and, on a CPU, an
    fp32 copy of the keys of these heads or, rounded, copies of them and of the logits in the dtype of the inputs.

    Args:
        q (Tensor): queries [B, Hq, m, D].
        k (Tensor): keys [B, Hkv, N, D].
        allowed (Tensor): which pairs may attend, bool [B or 1, 1, m, l], for the last l keys. All queries attend to the
            keys before those.
        block_size (int): tokens in a block.
        scale (float | None): factor of the products. Default: D ** -0.5.
        rounded (bool): whether a CPU multiplies the inputs as they are, which rounds logits to their dtype: see
            :func:`keys_to_multiply`. Default: False.

    Returns:
        Tensor: fp32 [B, Hq, m, ceil(N / block_size)]. Each query's row sums to 1, or to 0 if it may attend to
        nothing.
    """
    (batch, heads, rows, dim), (key_heads, tokens) = q.shape, k.shape[1:3]
    group, scale = heads // key_heads, LOG2_E * (dim**-0.5 if scale is None else scale)
    budget = (MAX_LOGITS_CPU if q.device.type == "cpu" else MAX_LOGITS_GPU) // (batch * group * tokens)
    heads_at_once, rows_at_once = max(1, budget // rows), max(-(-ROWS // group), budget)
    mass = torch.empty(batch, heads, rows, -(-tokens // block_size), device=q.device)
    for h in range(0, key_heads, heads_at_once):
        keys = k[:, h : h + heads_at_once]
        if q.device.type == "cpu":  # products with keys that lie apart, as models have them, cost more than a copy
            keys = (keys if rounded else keys.float()).contiguous()
        of = slice(h * group, (h + heads_at_once) * group)
        for r in range(0, rows, rows_at_once):
            part = slice(r, r + rows_at_once)
            logits, rest = group_logits(q[:, of, part], keys, scale, rounded=rounded)
            if allowed.shape[-1]:
                logits[..., -allowed.shape[-1] :].masked_fill_(~allowed[:, :, part], -torch.inf)
            mass[:, of, part] = block_shares(logits, block_size, rest)
    return mass


def keys_to_multiply(q: Tensor, k: Tensor, prompt: Prompt, first: int) -> tuple[Tensor, bool]:
    """What an estimate multiplies queries with, and whether it may take the products rounded to their dtype.

    CPUs that multiply bf16 take half of the time for that, and PyTorch has products of bf16 in bf16 alone there. Keys
    then are distances from the mean of the first ones: that moves all logits of a query by the same, which its
    softmax doesn't see, and takes most of what makes logits high, and so their rounding coarse, in real models.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        prompt (Prompt): what the tokens are; with padding in front, there is no rounding.
        first (int): how many are the first ones, the same number for all chunks of a prompt.

    Returns:
        tuple[Tensor, bool]: keys [B, Hkv, N, D], for the softmax of their products with q alone, and whether to round.
    """
    if q.device.type != "cpu" or kernel_dtype(q) != torch.bfloat16 or prompt.left_padding is not None:
        return k, False
    return k - k[:, :, :first].mean(2, keepdim=True), True


def blocks_of_gpu(held: int, n_q: int) -> int:
    """How many of ``n_q`` query blocks, ``held`` logits each, an estimate takes at once on a GPU.

    It would wait for the launches of small pieces; but each piece looks at all keys before its last row, so a quarter
    of the rows is enough.
    """
    return max(1, min(MAX_LOGITS_GPU // max(1, held), max(8, n_q // 4)))

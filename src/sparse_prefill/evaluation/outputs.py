"""The output of sparse attention, compared with that of dense attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_prefill.core.logits import PLAIN, Logits, attend_rows
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.true_mass import check_blocks


def output_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    prompt: Prompt,
    query_blocks: Sequence[int],
    logits: Logits = PLAIN,
) -> Tensor:
    """Norm of the difference from dense attention over the norm of dense attention, for each head.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        v (Tensor): values [B, Hkv, N, Dv].
        out (Tensor): output of sparse attention, [B, Hq, M, Dv].
        prompt (Prompt): what the tokens are.
        query_blocks (Sequence[int]): query blocks to compare, each in [0, n_q).
        logits (Logits): scale, soft cap and sinks. Default: products times D ** -0.5.

    Returns:
        Tensor: fp32 [B, Hq]; 0 where dense attention is 0.

    Raises:
        ValueError: if a block is out of range or ``out`` has another shape.
    """
    difference, norm = squared_error(q, k, v, out, prompt, query_blocks, logits)
    return (difference / norm.clamp(min=torch.finfo(norm.dtype).tiny)).sqrt().float()


def squared_error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    prompt: Prompt,
    query_blocks: Sequence[int],
    logits: Logits = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Squared norms of the difference from dense attention, and of dense attention, for each head.

    Their sums over heads give the error of a layer. Dense attention is computed in fp32, whatever the inputs are.

    Args and errors as for :func:`output_error`.

    Returns:
        tuple[Tensor, Tensor]: both float64 [B, Hq].
    """
    check_blocks(query_blocks, prompt)
    if out.shape != (*q.shape[:3], v.shape[3]):
        raise ValueError(f"out must be of shape {[*q.shape[:3], v.shape[3]]}, got {list(out.shape)}.")
    device, size = q.device, prompt.block_size
    keys, values = k.float(), v.float()
    difference = torch.zeros(q.shape[:2], dtype=torch.float64, device=device)
    norm = torch.zeros_like(difference)
    for block in query_blocks:
        rows = slice(block * size, min((block + 1) * size, prompt.q_len))
        seen = slice(min(prompt.kv_len, rows.stop + prompt.offset))  # no row sees later keys
        allowed = prompt.may_attend(prompt.query_positions(device)[rows], torch.arange(seen.stop, device=device))
        dense = attend_rows(q[:, :, rows].float(), keys[:, :, seen], values[:, :, seen], allowed, logits)
        difference += (out[:, :, rows].float() - dense).double().square().sum((-2, -1))
        norm += dense.double().square().sum((-2, -1))
    return difference, norm

"""Dense attention over all pairs that a prompt allows."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.logits import PLAIN, Logits, attend_rows
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_attention_inputs, check_prompt
from sparse_prefill.kernel.block_lists import block_tables
from sparse_prefill.kernel.flex import attend
from sparse_prefill.kernel.non_finite import are_finite, finite, with_non_finite
from sparse_prefill.kernel.segments import sink_segments


@own_precision
def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, prompt: Prompt, logits: Logits = PLAIN) -> Tensor:
    """Attention over all pairs of tokens that the prompt allows.

    SDPA computes plain causal prompts. Chunks, padding and windows would need an M x N mask there, so the block-sparse
    kernel computes them over all visible blocks. Single queries and prompts of one key block use a mask.

    Args, return value and errors as for :func:`~sparse_prefill.block_sparse_attention`, without the table.
    """
    check_attention_inputs(q, k, v)
    check_prompt(prompt, q, k)
    logits.check(q)
    inputs = AttentionInputs(q=q, k=k, v=v, prompt=prompt, logits=logits)
    if prompt.is_causal and prompt.q_len in (1, prompt.kv_len) and logits.are_plain:
        return _by_sdpa(inputs)
    if prompt.q_len == 1 or prompt.n_k == 1:
        return _by_rows(inputs)
    segments = sink_segments(inputs)
    everything = prompt.visible(q.device).expand(*q.shape[:2], -1, -1)
    return attend(inputs, block_tables(everything, prompt, segments), segments)


def _by_sdpa(inputs: AttentionInputs) -> Tensor:
    """Causal attention of a whole prompt, or of one query to all keys."""
    q, k, v = inputs.q, inputs.k, inputs.v
    is_causal = inputs.prompt.q_len > 1
    sdpa = partial(F.scaled_dot_product_attention, is_causal=is_causal, scale=inputs.logits.scale, enable_gqa=True)
    out = sdpa(q, k, v)
    # A finite output shows that the keys are finite, too. For a decode step it is much smaller than the cache.
    return out if are_finite(q, out) else with_non_finite(sdpa(q, k, finite(v)), inputs)


def _by_rows(inputs: AttentionInputs) -> Tensor:
    """Attention of so few pairs that the mask of all of them is small."""
    q, k, v, prompt, logits = inputs.q, inputs.k, inputs.v, inputs.prompt, inputs.logits
    rows, keys = prompt.query_positions(q.device), torch.arange(prompt.kv_len, device=q.device)
    allowed = prompt.may_attend(rows, keys)
    out = attend_rows(q, k, v, allowed, logits)
    if are_finite(q, out):
        return out
    visible_k = k.masked_fill(~allowed.any(2)[..., None], 0)  # SDPA adds the mask to the logits of the other keys
    return with_non_finite(attend_rows(q, visible_k, finite(v), allowed, logits), inputs)

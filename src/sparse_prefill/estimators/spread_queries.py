"""Exact attention of a few queries, spread over the whole prompt."""

from __future__ import annotations

from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_mass import attention_mass, center_keys

NUM_BLOCKS = 16  # query blocks in the sample
QUERIES_PER_BLOCK = 2


def spread_queries(q: Tensor, k: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Exact attention of 2 queries in each of 16 query blocks at equal distances, or in all blocks if there are fewer.

    These are too few to find a pattern, but enough to choose between patterns. On CPUs that multiply bf16, the logits
    of bf16 inputs are rounded to bf16: see :func:`center_keys`.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        prompt (Prompt): lengths and padding of the tokens.

    Returns:
        tuple[Tensor, Tensor]: the query blocks, int64 [m], and the mean attention of the two queries of each to each
        key block, fp32 [B, Hq, m, n_k]. Queries of padding have 0.
    """
    blocks, rows, allowed = prompt.spread_rows(NUM_BLOCKS, QUERIES_PER_BLOCK, q.device)
    keys, rounded = center_keys(q, k, prompt, prompt.block_size)
    mass = attention_mass(q[:, :, rows], keys, allowed, prompt.block_size, rounded=rounded)
    return blocks, mass.unflatten(2, (-1, QUERIES_PER_BLOCK)).mean(3)

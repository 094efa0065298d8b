"""True attention of a few queries that are spread over the whole prompt."""

from __future__ import annotations

from torch import Tensor

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.estimators.attention_mass import attention_mass, keys_to_multiply

BLOCKS = 16  # query blocks that are looked at
QUERIES = 2  # of each of them


def spread_queries(q: Tensor, k: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Exact attention of 2 queries in each of 16 query blocks at equal distances, or of all blocks if they are fewer.

    Too few to find a pattern, but enough to tell which of several is the better one. On CPUs that multiply bf16, logits
    of bf16 inputs are rounded to it: see :func:`keys_to_multiply`.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        prompt (Prompt): what the tokens are.

    Returns:
        tuple[Tensor, Tensor]: the query blocks, int64 [m], and the mass that a block's two queries put on each key
        block, mean over both: fp32 [B, Hq, m, n_k]. Queries of padding have none.
    """
    blocks, rows, allowed = prompt.spread_rows(BLOCKS, QUERIES, q.device)
    keys, rounded = keys_to_multiply(q, k, prompt, prompt.block_size)
    mass = attention_mass(q[:, :, rows], keys, allowed, prompt.block_size, rounded=rounded)
    return blocks, mass.unflatten(2, (-1, QUERIES)).mean(3)

"""Self-similarity of blocks: how alike their tokens are, hence how well the mean represents them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_prefill.core.key_blocks import of_key_blocks
from sparse_prefill.core.prompt import Prompt

MAX_ELEMENTS = 2**20  # in fp32 at once, unless one block has more; more leave a CPU's cache


def query_similarity(q: Tensor, prompt: Prompt) -> Tensor:
    """Mean cosine similarity of all pairs of tokens of each query block.

    With the m real tokens x_a of a block and u_a = x_a / |x_a|:

        similarity = 1 / m^2 * sum over a, b of u_a . u_b = |mean over a of u_a|^2

    Pairs of a token with itself count. So identical tokens have similarity 1, and m orthogonal tokens 1 / m. This is
    the self-similarity of SpargeAttention (arXiv 2502.18137). Scratch memory is a few fp32 tables of 2^20 elements, or
    of one block of all heads if that has more.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        prompt (Prompt): lengths and padding of the tokens. Padding isn't counted.

    Returns:
        Tensor: fp32 [B, Hq, n_q], 0 for a block without real tokens.
    """
    return _similarity(q, None if prompt.left_padding is None else prompt.real_queries(q.device), prompt.block_size)


def key_similarity(k: Tensor, prompt: Prompt) -> Tensor:
    """:func:`query_similarity` of key blocks: [B, Hkv, N, D] to fp32 [B, Hkv, n_k]."""
    if prompt.left_padding is not None:
        return _similarity(k, prompt.real_keys(k.device), prompt.block_size)
    return of_key_blocks("key similarity", k, prompt, lambda part: _similarity(part, None, prompt.block_size))


def dissimilar_blocks(q: Tensor, k: Tensor, prompt: Prompt, threshold: float) -> tuple[Tensor, Tensor]:
    """Blocks whose self-similarity is at most ``threshold``, so that their mean represents them badly.

    Returns:
        tuple[Tensor, Tensor]: query blocks, bool [B, Hq, n_q, 1], and key blocks, bool [B, Hq, 1, n_k].
    """
    columns = (key_similarity(k, prompt) <= threshold).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (query_similarity(q, prompt) <= threshold)[..., None], columns[:, :, None]


def _similarity(x: Tensor, real: Tensor | None, size: int) -> Tensor:
    batch, heads, tokens, dim = x.shape
    step = max(1, MAX_ELEMENTS // (batch * heads * size * dim)) * size
    parts = []
    for begin in range(0, tokens, step):
        part = slice(begin, min(begin + step, tokens))
        parts.append(_part(x[:, :, part], None if real is None else real[:, begin : part.stop], size))
    return torch.cat(parts, dim=2)


def _part(x: Tensor, real: Tensor | None, size: int) -> Tensor:
    unit = F.normalize(x.float(), dim=-1)
    if real is not None:
        unit = torch.where(real[:, None, :, None], unit, 0)
    count = torch.ones(1, x.shape[2], device=x.device) if real is None else real.float()  # [B or 1, tokens]
    slots = -x.shape[2] % size
    unit, count = F.pad(unit, (0, 0, 0, slots)), F.pad(count, (0, slots))
    count = count.unflatten(1, (-1, size)).sum(2).clamp(min=1)  # [B or 1, blocks]
    mean = unit.unflatten(2, (-1, size)).sum(3) / count[:, None, :, None]
    return mean.square().sum(-1)

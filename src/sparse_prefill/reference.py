"""What the fast path has to equal: attention, estimators and selectors as plain loops in float64.

Slow, and short enough to be checked by eye. A :class:`~sparse_prefill.Prompt` is read only for its lengths, padding,
documents and window. The library's tests compare against these functions, and so can the tests of your own method:

    >>> import torch
    >>> import sparse_prefill as sp
    >>> from sparse_prefill import reference
    >>> q, k = torch.randn(1, 4, 96, 16), torch.randn(1, 2, 96, 16)
    >>> prompt = sp.Prompt(q_len=96, block_size=16)
    >>> scores = sp.get_estimator("pooled_attention")(q, k, prompt)
    >>> torch.allclose(scores.double(), reference.pooled_attention(q, k, prompt), atol=1e-6)
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_prefill.core.prompt import Prompt

# Tokens ---------------------------------------------------------------------------------------------------


def token_mask(prompt: Prompt, batch: int = 1) -> Tensor:
    """Which query row may attend to which key: bool [B, M, N].

    The rules are causality, padding, documents and the sliding window. Rows of right padding attend to nothing.
    """
    mask = torch.zeros(batch, prompt.q_len, prompt.kv_len, dtype=torch.bool)
    for b in range(batch):
        for row in range(prompt.q_len):
            position = prompt.kv_len - prompt.q_len + row
            first = first_key(prompt, b, position)
            if prompt.window is not None:
                first = max(first, position - prompt.window + 1)
            if position < spans(prompt, b)[-1][1]:
                mask[b, row, first : position + 1] = True
    return mask


def first_key(prompt: Prompt, b: int, position: int) -> int:
    """The earliest key of the prompt or document that the token at ``position`` of batch row ``b`` belongs to."""
    if prompt.left_padding is not None:
        return int(prompt.left_padding[b % len(prompt.left_padding)])
    if prompt.documents is not None:
        ids = _document_ids(prompt.documents, b)
        return ids.index(ids[position])
    return 0


def padding_of(prompt: Prompt, b: int) -> int:
    """How many tokens of left padding batch row ``b`` has."""
    return 0 if prompt.left_padding is None else first_key(prompt, b, 0)


def spans(prompt: Prompt, b: int) -> list[tuple[int, int]]:
    """The first position and the end of each document of batch row ``b``, or of its real tokens without documents."""
    if prompt.documents is not None:
        ids = _document_ids(prompt.documents, b)
        return [(ids.index(i), len(ids) - ids[::-1].index(i)) for i in sorted(set(ids))]
    left, right = (
        0 if padding is None else int(padding[b if len(padding) > 1 else 0])
        for padding in (prompt.left_padding, prompt.right_padding)
    )
    return [(left, prompt.kv_len - right)]


def _document_ids(documents: Tensor | Sequence[int] | Sequence[Sequence[int]], b: int) -> list[int]:
    ids = torch.as_tensor(documents)
    return ids[b % len(ids)].tolist()


# Attention ------------------------------------------------------------------------------------------------


def probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax over the allowed keys of scale * q . k.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D]; query head h attends to key head h // (Hq / Hkv).
        mask (Tensor): which pairs may attend, bool, broadcastable to [B, Hq, M, N].
        scale (float | None): factor of the products. Default: D ** -0.5.

    Returns:
        Tensor: float64 [B, Hq, M, N]; a row without allowed keys is 0.
    """
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = mask.expand(batch, heads, -1, -1)
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            logits = q[b, h].double() @ k[b, h // group].double().T * scale
            out[b, h] = logits.masked_fill(~mask[b, h], -math.inf).softmax(-1)
    return out.masked_fill(~mask.any(-1, keepdim=True), 0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Attention under a token mask: :func:`probabilities` times v [B, Hkv, N, Dv], float64 [B, Hq, M, Dv]."""
    group = q.shape[1] // k.shape[1]
    return probabilities(q, k, mask, scale) @ v.double().repeat_interleave(group, dim=1)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, prompt: Prompt, scale: float | None = None
) -> Tensor:
    """Attention over the kept blocks: float64 [B, Hq, M, Dv].

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        v (Tensor): values [B, Hkv, N, Dv].
        keep (Tensor): which key blocks each query block attends to, bool, [B or 1, Hq or 1, n_q, n_k]. Within them
            :func:`token_mask` applies.
        prompt (Prompt): lengths, padding, documents and window.
        scale (float | None): factor of the products. Default: D ** -0.5.
    """
    size = prompt.block_size
    tokens = keep.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, : prompt.q_len, : prompt.kv_len]
    return attention(q, k, v, tokens & token_mask(prompt, q.shape[0])[:, None], scale)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, prompt: Prompt, scale: float | None = None) -> Tensor:
    """:func:`sparse_attention` over all blocks."""
    return attention(q, k, v, token_mask(prompt, q.shape[0])[:, None], scale)


# Blocks ---------------------------------------------------------------------------------------------------


def query_block(prompt: Prompt, i: int) -> range:
    """The query rows of block i."""
    return range(i * prompt.block_size, min((i + 1) * prompt.block_size, prompt.q_len))


def key_block(prompt: Prompt, j: int) -> range:
    """The keys of block j."""
    return range(j * prompt.block_size, min((j + 1) * prompt.block_size, prompt.kv_len))


def block_table(prompt: Prompt, batch: int, rule: Callable[[int, range, range], object]) -> Tensor:
    """The table of ``rule(b, rows, keys)`` for all pairs of a query block and a key block: bool [B, 1, n_q, n_k]."""
    table = torch.zeros(batch, 1, prompt.n_q, prompt.n_k, dtype=torch.bool)
    for b in range(batch):
        for i in range(prompt.n_q):
            for j in range(prompt.n_k):
                table[b, 0, i, j] = bool(rule(b, query_block(prompt, i), key_block(prompt, j)))
    return table


def visible(prompt: Prompt, batch: int = 1) -> Tensor:
    """Block pairs in which some token pair may attend: bool [B, 1, n_q, n_k]."""
    mask = token_mask(prompt, batch)
    return block_table(prompt, batch, lambda b, r, c: mask[b, r.start : r.stop, c.start : c.stop].any())


def fully_visible(prompt: Prompt, batch: int = 1) -> Tensor:
    """Block pairs in which all token pairs may attend, unless the key block is a ragged end: bool [B, 1, n_q, n_k]."""
    mask = token_mask(prompt, batch)

    def rule(b: int, rows: range, keys: range) -> bool:
        return len(keys) == prompt.block_size and bool(mask[b, rows.start : rows.stop, keys.start : keys.stop].all())

    return block_table(prompt, batch, rule)


def diagonal(prompt: Prompt, batch: int = 1) -> Tensor:
    """Key blocks that hold the position of a real query of the query block: bool [B, 1, n_q, n_k]."""
    offset = prompt.kv_len - prompt.q_len

    def own(b: int, rows: range, keys: range) -> bool:
        first, last = padding_of(prompt, b), spans(prompt, b)[-1][1] - 1
        return any(row + offset in keys and first <= row + offset <= last for row in rows)

    return block_table(prompt, batch, own)


# Estimators -----------------------------------------------------------------------------------------------


def block_means(x: Tensor, prompt: Prompt, queries: bool) -> Tensor:
    """Means over the real tokens of each block: float64 [B, H, n_q or n_k, D], 0 for blocks without real tokens.

    Args:
        x (Tensor): queries [B, Hq, M, D] or keys [B, Hkv, N, D].
        prompt (Prompt): lengths and padding.
        queries (bool): whether x are queries.
    """
    offset = prompt.kv_len - prompt.q_len if queries else 0
    n, block = (prompt.n_q, query_block) if queries else (prompt.n_k, key_block)
    out = torch.zeros(*x.shape[:2], n, x.shape[3], dtype=torch.float64)
    for b in range(x.shape[0]):
        for i in range(n):
            real = [t for t in block(prompt, i) if t + offset >= padding_of(prompt, b)]
            if real:
                out[b, :, i] = x[b, :, real].double().mean(1)
    return out


def block_mass(q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
    """The estimator ``true_mass``: mean attention of a block's real queries, by block: float64 [B, Hq, n_q, n_k]."""
    p = probabilities(q, k, token_mask(prompt, q.shape[0])[:, None])
    out = torch.zeros(*q.shape[:2], prompt.n_q, prompt.n_k, dtype=torch.float64)
    for b in range(q.shape[0]):
        for i in range(prompt.n_q):
            offset = prompt.kv_len - prompt.q_len
            real = [row for row in query_block(prompt, i) if row + offset >= padding_of(prompt, b)]
            for j in range(prompt.n_k):
                keys = key_block(prompt, j)
                if real:
                    out[b, :, i, j] = p[b, :, real, keys.start : keys.stop].sum(-1).mean(-1)
    return out


def pooled_attention(q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
    """The estimator ``pooled_attention``: :func:`probabilities` of block means, float64 [B, Hq, n_q, n_k]."""
    means = block_means(q, prompt, True), block_means(k, prompt, False)
    return probabilities(*means, visible(prompt, q.shape[0]))


def representative(q: Tensor, k: Tensor, prompt: Prompt, stride: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The estimator ``representative``: attention of the last ``block_size`` queries.

    With a ``stride``, of the last query and of every ``stride``-th before it.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor]: mean attention by key block and by block diagonal, each [B, Hq, n_k]; the
        mean of the queries [B, Hq, 1, D]; the most that one query gives to each key block [B, Hq, n_k]. All float64.
    """
    size, count = prompt.block_size, min(prompt.block_size, prompt.q_len)
    p = probabilities(q, k, token_mask(prompt, q.shape[0])[:, None])
    vertical = torch.zeros(*q.shape[:2], prompt.n_k, dtype=torch.float64)
    slash = torch.zeros_like(vertical)
    mean_query = torch.zeros(*q.shape[:2], 1, q.shape[3], dtype=torch.float64)
    peak = torch.zeros_like(vertical)
    for b in range(q.shape[0]):
        offset = prompt.kv_len - prompt.q_len
        last = range(prompt.q_len - 1, prompt.q_len - count - 1, -stride)
        rows = [r for r in last if r + offset >= padding_of(prompt, b)]
        for row in rows:
            mean_query[b, :, 0] += q[b, :, row].double() / len(rows)
            for j in range(prompt.n_k):
                keys = key_block(prompt, j)
                mass = p[b, :, row, keys.start : keys.stop].sum(-1)
                vertical[b, :, j] += mass / len(rows)
                peak[b, :, j] = torch.maximum(peak[b, :, j], mass)
                if (distance := (row + offset) // size - j) >= 0:
                    slash[b, :, distance] += mass / len(rows)
    return vertical, slash, mean_query, peak


def token_by_mean(q: Tensor, k: Tensor, prompt: Prompt, per_group: bool = False) -> Tensor:
    """The estimator ``token_by_mean``: exp(q . block mean / sqrt(D)), summed over the queries of a block.

    A query scores the key blocks that end at or before its position, within its document.

    Returns:
        Tensor: float64 [B, Hq, n_q, n_k]; rows sum to 1, or to 0 without a scored block.
    """
    means = block_means(k, prompt, queries=False)
    group, offset = q.shape[1] // k.shape[1], prompt.kv_len - prompt.q_len
    out = torch.zeros(*q.shape[:2], prompt.n_q, prompt.n_k, dtype=torch.float64)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        keys = key_block(prompt, j)
        for row in query_block(prompt, i):
            first = first_key(prompt, b, row + offset)
            begin = max(keys.start, first) if prompt.documents is None else keys.start
            if first <= begin <= keys.stop - 1 <= row + offset:
                logit = float(q[b, h, row].double() @ means[b, h // group, j]) / math.sqrt(q.shape[-1])
                out[b, h, i, j] += math.exp(logit)
    if per_group:
        out = out.unflatten(1, (-1, group)).sum(2).repeat_interleave(group, dim=1)
    return out / out.sum(-1, keepdim=True).clamp(min=1e-300)


# Selectors ------------------------------------------------------------------------------------------------


def largest(scores: Sequence[float], count: int) -> set[int]:
    """The selector ``top_k`` in one row: indices of the ``count`` largest entries; of equal ones the earlier."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def fewest(mass: Sequence[float], share: float) -> int:
    """The selector ``cumulative`` in one row: how many of the largest entries hold ``share`` of the sum."""
    if share == 1:
        return len(mass)
    total, reached = sum(mass), 0.0
    for count, x in enumerate(sorted(mass, reverse=True), 1):
        reached += x
        if reached >= share * total:
            return count
    return len(mass)

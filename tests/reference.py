"""Inputs for tests, and reference versions of whole methods in float64 with plain loops.

The parts that methods share are in ``sparse_prefill.reference``, and are exported from here too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_prefill import Prompt
from sparse_prefill.reference import (
    attention,
    block_mass,
    block_means,
    block_table,
    dense_attention,
    diagonal,
    fewest,
    first_key,
    fully_visible,
    key_block,
    largest,
    padding_of,
    pooled_attention,
    probabilities,
    query_block,
    representative,
    spans,
    sparse_attention,
    token_by_mean,
    token_mask,
    visible,
)

__all__ = [
    "attention",
    "block_mass",
    "block_means",
    "block_table",
    "dense_attention",
    "diagonal",
    "fewest",
    "first_key",
    "flex_prefill",
    "flex_prefill_official",
    "fully_visible",
    "jensen_shannon_distance",
    "key_block",
    "largest",
    "padding_of",
    "pooled_attention",
    "probabilities",
    "query_block",
    "random_qkv",
    "representative",
    "spans",
    "sparse_attention",
    "sparse_by_pieces",
    "token_by_mean",
    "token_mask",
    "visible",
]


def random_qkv(batch=1, heads=6, kv_heads=2, q_len=100, kv_len=None, dim=16, seed=0, scale=1.0, dtype=torch.float32):
    """Normal q [batch, heads, q_len, dim], k and v [batch, kv_heads, kv_len, dim]; ``scale`` multiplies q."""
    kv_len = q_len if kv_len is None else kv_len
    source = torch.Generator().manual_seed(seed)
    sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    q, k, v = (torch.randn(batch, h, n, dim, generator=source) for h, n in sizes)
    return (q * scale).to(dtype), k.to(dtype), v.to(dtype)


def sparse_by_pieces(q, k, v, strategy, prompt: Prompt, scale: float | None = None) -> tuple[Tensor, bool]:
    """The output where each row of a batch and each document is a separate prompt, and whether any block is skipped."""
    out, skipped = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64), False
    for b in range(q.shape[0]):
        for begin, end in spans(prompt, b):
            first = max(begin, prompt.offset)
            if first >= end:
                continue
            rows, keys = slice(first - prompt.offset, end - prompt.offset), slice(begin, end)
            of = q[b : b + 1, :, rows], k[b : b + 1, :, keys], v[b : b + 1, :, keys]
            piece = Prompt(end - first, end - begin, prompt.block_size, window=prompt.window)
            keep = strategy.keep(of[0] if scale is None else of[0] * (scale * q.shape[-1] ** 0.5), of[1], piece)
            if strategy.dense_reason(piece):
                keep = piece.visible()
            skipped |= bool((piece.visible() & ~keep).any())
            out[b : b + 1, :, rows] = sparse_attention(*of, keep, piece, scale)
    return out, skipped


# FlexPrefill ----------------------------------------------------------------------------------------------


def jensen_shannon_distance(a: list[float], b: list[float]) -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        middle = (x + y) / 2
        total += (x * math.log(x / middle) if x else 0) + (y * math.log(y / middle) if y else 0)
    return math.sqrt(max(total, 0) / 2)


def flex_prefill(
    q: Tensor,
    k: Tensor,
    prompt: Prompt,
    *,
    gamma: float,
    tau: float,
    min_budget: int,
    max_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """FlexPrefill on the block grid: keep table bool [B, Hq, n_q, n_k] and query-aware heads bool [B, Hq]."""
    size, n_q, n_k = prompt.block_size, prompt.n_q, prompt.n_k
    offset = prompt.kv_len - prompt.q_len
    least = math.ceil(min_budget / size)
    most = n_k if max_budget is None else min(math.ceil(max_budget / size), n_k)
    vertical, slash, mean_query, _ = representative(q, k, prompt)
    k_means = block_means(k, prompt, False)
    pooled_map = pooled_attention(q, k, prompt)
    seen = visible(prompt, q.shape[0])
    own = diagonal(prompt, q.shape[0])
    keep = torch.zeros(*q.shape[:2], n_q, n_k, dtype=torch.bool)
    query_aware = torch.zeros(q.shape[:2], dtype=torch.bool)
    for b in range(q.shape[0]):
        first = padding_of(prompt, b) // size  # the first block with a real token
        for h in range(q.shape[1]):
            columns, diagonals = vertical[b, h].tolist(), slash[b, h].tolist()
            logits = k_means[b, h // (q.shape[1] // k.shape[1])] @ mean_query[b, h, 0] / math.sqrt(q.shape[-1])
            logits[:first] = -math.inf
            query_aware[b, h] = jensen_shannon_distance(logits.softmax(-1).tolist(), columns) < tau
            if query_aware[b, h]:
                n_columns = n_diagonals = least
            else:
                n_columns = min(max(fewest(columns, gamma), least), most)
                n_diagonals = min(max(fewest(diagonals, gamma), least), most)
            kept_columns, kept_diagonals = largest(columns, n_columns), largest(diagonals, n_diagonals)
            cells = [(i, j) for i in range(n_q) for j in range(n_k)]
            pooled = [pooled_map[b, h, i, j].item() for i, j in cells]
            kept_cells = largest(pooled, fewest(pooled, gamma)) if query_aware[b, h] else set()
            for cell, (i, j) in enumerate(cells):
                rows = query_block(prompt, i)
                distances = {(rows.start + offset) // size - j, (rows.stop - 1 + offset) // size - j}
                chosen = j in kept_columns or distances & kept_diagonals or cell in kept_cells
                keep[b, h, i, j] = bool(seen[b, 0, i, j] and (chosen or own[b, 0, i, j] or j == first))
    return keep, query_aware


def flex_prefill_official(
    q: Tensor,
    k: Tensor,
    size: int,
    *,
    gamma: float,
    tau: float,
    min_budget: int,
    max_budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """FlexPrefill as released, for whole prompts: keep table bool [B, Hq, n, n] and query-aware heads."""
    batch, heads, n_tokens, dim = q.shape
    n = math.ceil(n_tokens / size)
    pad = n * size - n_tokens
    least = math.ceil(min_budget / size)
    most = n if max_budget is None else min(math.ceil(max_budget / size), n)
    keep = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    query_aware = torch.zeros(batch, heads, dtype=torch.bool)
    if n_tokens <= max(2 * size, least * size):
        return keep | torch.ones(n, n, dtype=torch.bool).tril(), query_aware
    prompt = Prompt(q_len=n_tokens, block_size=size)
    p = probabilities(q, k, token_mask(prompt)[:, None])[:, :, -size:]
    q_means, k_means = block_means(q, prompt, True), block_means(k, prompt, False)

    def budget(mass: Tensor) -> int:
        """The number of blocks for a share of ``mass`` by token: tokens / 128, for any block size."""
        within = (mass.sort(descending=True).values.cumsum(0) <= gamma).sum().item()
        return min(max((within + 1) // 128 + 1, least), most)

    for b in range(batch):
        for h in range(heads):
            key_means = k_means[b, h // (heads // k.shape[1])]
            by_key = p[b, h].mean(0)
            by_distance = torch.zeros(n_tokens, dtype=torch.float64)
            for row in range(size):
                position = n_tokens - size + row
                by_distance[: position + 1] += p[b, h, row, : position + 1].flip(0) / size
            vertical = [by_key[key_block(prompt, c).start : key_block(prompt, c).stop].sum().item() for c in range(n)]
            slash = [by_distance[max(o * size - pad, 0) : (o + 1) * size - pad].sum().item() for o in range(n)]
            logits = q[b, h, -size:].double().mean(0) @ key_means.T / math.sqrt(dim)
            query_aware[b, h] = jensen_shannon_distance(logits.softmax(-1).tolist(), vertical) < tau
            n_columns = least if query_aware[b, h] else budget(by_key)
            n_diagonals = least if query_aware[b, h] else budget(by_distance)
            vertical[0] = slash[0] = math.inf
            columns, diagonals = largest(vertical, n_columns), largest(slash, n_diagonals)
            for i in range(n):
                for j in range(i + 1):
                    keep[b, h, i, j] = j in columns or i - j in diagonals
            if query_aware[b, h]:
                logits = q_means[b, h] @ key_means.T / math.sqrt(dim)
                causal = torch.ones(n, n, dtype=torch.bool).tril()
                cells = logits.masked_fill(~causal, -math.inf).softmax(-1).flatten()
                ranked, order = cells.sort(descending=True)
                inside = order[ranked.cumsum(0) <= gamma * n]
                keep[b, h].view(-1)[inside] = True
                keep[b, h] &= causal
            keep[b, h] |= torch.eye(n, dtype=torch.bool)  # the library always keeps it, and slash 0 covers it too
    return keep, query_aware

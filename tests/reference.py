"""The formulas once more, in float64 with plain loops: slow, and short enough to be checked by eye.

Nothing here calls the library, except that a prompt is read for its lengths, padding and documents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_prefill import Prompt


def random_qkv(batch=1, heads=6, kv_heads=2, q_len=100, kv_len=None, dim=16, seed=0, scale=1.0, dtype=torch.float32):
    """Normal q [batch, heads, q_len, dim], k and v [batch, kv_heads, kv_len, dim]; ``scale`` multiplies q."""
    kv_len = q_len if kv_len is None else kv_len
    source = torch.Generator().manual_seed(seed)
    sizes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    q, k, v = (torch.randn(batch, h, n, dim, generator=source) for h, n in sizes)
    return (q * scale).to(dtype), k.to(dtype), v.to(dtype)


# Tokens ---------------------------------------------------------------------------------------------------


def token_mask(prompt: Prompt, batch: int = 1) -> Tensor:
    """Which query row may attend to which key: bool [batch, q_len, kv_len]."""
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
    """The earliest key of the same prompt or document."""
    if prompt.left_padding is not None:
        return int(prompt.left_padding[b % len(prompt.left_padding)])
    if prompt.documents is not None:
        documents = prompt.documents[b % len(prompt.documents)].tolist()
        return documents.index(documents[position])
    return 0


def padding_of(prompt: Prompt, b: int) -> int:
    return 0 if prompt.left_padding is None else first_key(prompt, b, 0)


# Attention ------------------------------------------------------------------------------------------------


def probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax over the allowed keys: float64 [B, Hq, M, N]; a row that may see nothing is 0.

    ``mask`` is bool, broadcastable to [B, Hq, M, N].
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
    """Attention under a token mask: float64 [B, Hq, M, Dv]."""
    group = q.shape[1] // k.shape[1]
    return probabilities(q, k, mask, scale) @ v.double().repeat_interleave(group, dim=1)


def sparse_attention(q, k, v, keep: Tensor, prompt: Prompt, scale: float | None = None) -> Tensor:
    """Attention under a keep table, spread out to tokens, and the prompt's token mask."""
    size = prompt.block_size
    tokens = keep.repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, : prompt.q_len, : prompt.kv_len]
    return attention(q, k, v, tokens & token_mask(prompt, q.shape[0])[:, None], scale)


def sparse_by_pieces(q, k, v, strategy, prompt: Prompt, scale: float | None = None) -> tuple[Tensor, bool]:
    """Each row of a padded batch and each packed document attended as if it were alone, and whether it skips any."""
    out, skipped = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64), False
    for b in range(q.shape[0]):
        for begin, end in spans(prompt, b):
            first = max(begin, prompt.offset)
            if first >= end:
                continue
            rows, keys = slice(first - prompt.offset, end - prompt.offset), slice(begin, end)
            of = q[b : b + 1, :, rows], k[b : b + 1, :, keys], v[b : b + 1, :, keys]
            alone = Prompt(end - first, end - begin, prompt.block_size, window=prompt.window)
            keep = strategy.keep(of[0] if scale is None else of[0] * (scale * q.shape[-1] ** 0.5), of[1], alone)
            if strategy.dense_reason(alone):
                keep = alone.visible()
            skipped |= bool((alone.visible() & ~keep).any())
            out[b : b + 1, :, rows] = sparse_attention(*of, keep, alone, scale)
    return out, skipped


def spans(prompt: Prompt, b: int) -> list[tuple[int, int]]:
    """First and last-but-one token of each prompt in a row of a batch."""
    if prompt.documents is not None:
        ids = prompt.documents[b if len(prompt.documents) > 1 else 0].tolist()
        return [(ids.index(i), len(ids) - ids[::-1].index(i)) for i in sorted(set(ids))]
    left, right = (
        0 if padding is None else int(padding[b if len(padding) > 1 else 0])
        for padding in (prompt.left_padding, prompt.right_padding)
    )
    return [(left, prompt.kv_len - right)]


def dense_attention(q, k, v, prompt: Prompt, scale: float | None = None) -> Tensor:
    """Attention under the prompt's token mask alone."""
    return attention(q, k, v, token_mask(prompt, q.shape[0])[:, None], scale)


# Blocks ---------------------------------------------------------------------------------------------------


def query_block(prompt: Prompt, i: int) -> range:
    """Query rows of block i."""
    return range(i * prompt.block_size, min((i + 1) * prompt.block_size, prompt.q_len))


def key_block(prompt: Prompt, j: int) -> range:
    """Keys of block j."""
    return range(j * prompt.block_size, min((j + 1) * prompt.block_size, prompt.kv_len))


def block_table(prompt: Prompt, batch: int, rule) -> Tensor:
    """bool [batch, 1, n_q, n_k] of ``rule(b, rows, keys)`` with the ranges of both blocks."""
    table = torch.zeros(batch, 1, prompt.n_q, prompt.n_k, dtype=torch.bool)
    for b in range(batch):
        for i in range(prompt.n_q):
            for j in range(prompt.n_k):
                table[b, 0, i, j] = bool(rule(b, query_block(prompt, i), key_block(prompt, j)))
    return table


def visible(prompt: Prompt, batch: int = 1) -> Tensor:
    mask = token_mask(prompt, batch)
    return block_table(prompt, batch, lambda b, r, c: mask[b, r.start : r.stop, c.start : c.stop].any())


def fully_visible(prompt: Prompt, batch: int = 1) -> Tensor:
    """Every pair allowed, and the key block is no ragged end."""
    mask = token_mask(prompt, batch)
    return block_table(
        prompt,
        batch,
        lambda b, r, c: len(c) == prompt.block_size and mask[b, r.start : r.stop, c.start : c.stop].all(),
    )


def diagonal(prompt: Prompt, batch: int = 1) -> Tensor:
    """Blocks with the own position of a query that is no padding."""
    offset = prompt.kv_len - prompt.q_len

    def own(b, rows, keys):
        first, last = padding_of(prompt, b), spans(prompt, b)[-1][1] - 1
        return any(row + offset in keys and first <= row + offset <= last for row in rows)

    return block_table(prompt, batch, own)


def block_means(x: Tensor, prompt: Prompt, queries: bool) -> Tensor:
    """Means over the real tokens of each block, 0 where there is none: float64 [B, H, blocks, D]."""
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
    """Mean mass that the real queries of a block put on each block of keys: float64 [B, Hq, n_q, n_k]."""
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
    """Softmax over the visible blocks between block means: float64 [B, Hq, n_q, n_k]."""
    means = block_means(q, prompt, True), block_means(k, prompt, False)
    return probabilities(*means, visible(prompt, q.shape[0]))


def representative(q: Tensor, k: Tensor, prompt: Prompt, stride: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of the last block_size queries by key block and by block diagonal, their mean, and the most by block.

    With a stride, of the last one and of every so-many-th of them before it.
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


# FlexPrefill ----------------------------------------------------------------------------------------------


def jensen_shannon_distance(a: list[float], b: list[float]) -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        middle = (x + y) / 2
        total += (x * math.log(x / middle) if x else 0) + (y * math.log(y / middle) if y else 0)
    return math.sqrt(max(total, 0) / 2)


def fewest(mass: list[float], share: float) -> int:
    """How many of the largest entries it takes to reach ``share`` of the sum."""
    if share == 1:
        return len(mass)
    total, reached = sum(mass), 0.0
    for count, x in enumerate(sorted(mass, reverse=True), 1):
        reached += x
        if reached >= share * total:
            return count
    return len(mass)


def largest(mass: list[float], count: int) -> set[int]:
    """Indices of the ``count`` largest entries; of equal ones the earlier."""
    return set(sorted(range(len(mass)), key=lambda i: (-mass[i], i))[:count])


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
    """FlexPrefill on the block grid: keep bool [B, Hq, n_q, n_k], and which heads are query-aware, bool [B, Hq]."""
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
    """FlexPrefill as released, for whole prompts: keep bool [B, Hq, n, n], and which heads are query-aware."""
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
        """Blocks for a share of ``mass`` by token: tokens over a literal 128, whatever the block size."""
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
            keep[b, h] |= torch.eye(n, dtype=torch.bool)  # always kept by the library, and by slash 0 anyway
    return keep, query_aware

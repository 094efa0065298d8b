"""MInference's search: of patterns of one cost, the one whose output comes closest to dense attention, by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparse_prefill import evaluation
from sparse_prefill.core.option_checks import check_fraction, check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.eval_model import EvalModel, LayerInputs
from sparse_prefill.models.observe import OnProgress, Texts, observe, part_of
from sparse_prefill.strategies.minference import HeadPattern, MInference

# The published candidates, whose sizes are moved until their cost is the target's.
SHAPES = (
    HeadPattern("stream_llm", 1024, 4096),
    HeadPattern("vertical_and_slash", 30, 2048),
    HeadPattern("vertical_and_slash", 100, 1800),
    HeadPattern("vertical_and_slash", 500, 1500),
    HeadPattern("vertical_and_slash", 3000, 200),
    HeadPattern("block_sparse", 100, 0),
)
STEPS = 2**10  # between a hundredth of a candidate's sizes and the whole prompt
Patterns = list[dict[int, HeadPattern]]


def search_patterns(
    subject: EvalModel,
    texts: Texts,
    *,
    density: float = 0.25,
    shapes: Sequence[HeadPattern] = SHAPES,
    strategy: MInference | None = None,
    query_blocks: int = 8,
    on_progress: OnProgress | None = None,
) -> Patterns:
    """Find the pattern of each head as the paper of MInference does: candidates of one cost, compared by their output.

    Both sizes of each candidate are scaled together, head by head, to the most whose cost stays within the target; cost
    is the share of blocks that the head computes, guards included. Of these candidates a head gets the one whose
    attention output is closest to that of dense attention, in the norm of the difference. Texts run through the model
    twice. Layers with sliding windows get patterns, too, which nothing reads where these windows run dense in use.

    Args:
        subject (EvalModel): the model.
        texts (Sequence): token ids of sample texts, as long as the prompts to come: sizes are in tokens.
        density (float): cost of every candidate, in (0, 1]. Default: 0.25.
        shapes (Sequence[HeadPattern]): the candidates. Default: those of the paper.
        strategy (MInference | None): guards, block size and last queries. Default: those of ``minference``.
        query_blocks (int): query blocks of each text to compare. Default: 8.
        on_progress (Callable | None): called as ``on_progress(done, total)`` after each layer. Default: nothing.

    Returns:
        list[dict[int, HeadPattern]]: patterns of all query heads by layer, scored by 1 minus the relative error of the
        output. :func:`~sparse_prefill.strategies.minference.save_patterns` writes them for
        ``get_strategy("minference", config=path)``.

    Raises:
        ValueError: if an option is out of range, a text is run dense, or the guards alone cost more than ``density``.

    Example:
        >>> save_patterns("patterns.json", search_patterns(subject, [subject.encode(text)]))
    """
    check_fraction("density", density)
    check_tokens("query_blocks", query_blocks, least=1)
    strategy = MInference() if strategy is None else strategy
    if strategy.config is not None or strategy.heads:
        raise ValueError("The search finds the patterns of all heads: drop config and heads of the strategy.")
    if not shapes:
        raise ValueError("shapes must hold at least one candidate, got none.")
    seen: dict[int, list[_Scored]] = {}
    errors: dict[int, Tensor] = {}  # by layer, fp64 [shapes, Hq], sums over the texts
    sized: dict[int, list[list[HeadPattern]]] = {}  # by layer, of each shape a pattern for each head

    def score(index: int, sight: LayerInputs) -> None:
        columns, blocks = (
            replace(strategy, pattern=name).score(sight.q, sight.k, sight.prompt)
            for name in ("vertical_and_slash", "block_sparse")
        )
        scores = columns._replace(pooled=blocks.pooled)
        like = sight.q.new_empty(()).expand(sight.q.shape)
        seen.setdefault(sight.layer, []).append(_Scored(strategy, scores, like, sight.prompt))

    def compare(index: int, sight: LayerInputs) -> None:
        if sight.layer not in sized:
            sized[sight.layer] = [_sized(shape, seen[sight.layer], density) for shape in shapes]
        scored = seen[sight.layer][index]
        found = output_errors(sight, [scored.keep(patterns) for patterns in sized[sight.layer]], query_blocks)
        errors[sight.layer] = errors.get(sight.layer, 0) + found

    with torch.inference_mode():
        observe(subject, strategy, texts, score, part_of(on_progress, 0, 2))
        observe(subject, strategy, texts, compare, part_of(on_progress, 1, 2))
    return [_closest(sized[layer], errors[layer] / len(texts)) for layer in sorted(sized)]


def output_errors(sight: LayerInputs, keeps: Sequence[Tensor], query_blocks: int) -> Tensor:
    """How far the output of each table is from that of dense attention, over some query blocks.

    The exact output is taken apart by key block, so that further tables cost next to nothing.

    Args:
        sight (LayerInputs): a layer.
        keeps (Sequence[Tensor]): keep tables, bool [1, Hq or 1, n_q, n_k] each.
        query_blocks (int): how many query blocks to look at.

    Returns:
        Tensor: norm of the difference over that of the dense output, fp64 [tables, Hq].
    """
    heads, device = sight.q.shape[1], sight.q.device
    difference = torch.zeros(len(keeps), heads, dtype=torch.float64, device=device)
    norm = torch.zeros(heads, dtype=torch.float64, device=device)
    for block in evaluation.spread_blocks(sight.prompt.n_q, query_blocks):
        parts, mass = _parts(sight, block)  # [Hq, m, n_k, Dv], [Hq, m, n_k]
        dense = parts.sum(2)
        norm += dense.double().square().sum((1, 2))
        each = []
        for keep in keeps:
            kept = keep[0, :, block, None].expand(len(parts), 1, -1).float()  # [Hq, 1, n_k]
            out = (parts * kept[..., None]).sum(2) / (mass * kept).sum(2, keepdim=True).clamp(min=1e-30)
            each.append((out - dense).double().square().sum((1, 2)))
        difference += torch.stack(each)
    if not bool(norm.isfinite().all()):
        raise ValueError("The model's attention isn't finite numbers: try another dtype.")
    return (difference / norm.clamp(min=1e-30)).sqrt()


def _parts(sight: LayerInputs, block: int) -> tuple[Tensor, Tensor]:
    """What each key block adds to the output of a query block's rows [Hq, m, n_k, Dv], and its probability mass."""
    prompt, size = sight.prompt, sight.prompt.block_size
    positions = prompt.query_positions(sight.q.device)[block * size : (block + 1) * size]
    group = sight.q.shape[1] // sight.k.shape[1]
    q = sight.q[0, :, block * size : (block + 1) * size].float().unflatten(0, (-1, group))  # [Hkv, G, m, D]
    k, v = sight.k[0].float()[:, None], sight.v[0].float()[:, None]
    allowed = prompt.may_attend(positions, torch.arange(prompt.kv_len, device=q.device))[0, 0]
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    probability = logits.masked_fill(~allowed, -torch.inf).softmax(-1)  # [Hkv, G, m, N]
    ragged = prompt.n_k * size - prompt.kv_len
    probability = torch.nn.functional.pad(probability, (0, ragged)).unflatten(-1, (prompt.n_k, size))
    v = torch.nn.functional.pad(v, (0, 0, 0, ragged)).unflatten(2, (prompt.n_k, size))  # [Hkv, 1, n_k, size, Dv]
    parts = (probability.transpose(2, 3) @ v).transpose(2, 3)  # [Hkv, G, m, n_k, Dv]
    return parts.flatten(0, 1), probability.sum(-1).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class _Scored:
    """One layer of one text."""

    strategy: MInference
    scores: Any  # for patterns of all types
    like: Tensor
    prompt: Prompt

    def keep(self, patterns: Sequence[HeadPattern]) -> Tensor:
        """The table of one pattern for each head: bool [1, Hq, n_q, n_k]."""
        strategy = replace(self.strategy, heads=dict(enumerate(patterns)))
        return strategy.guarded(strategy.select(self.scores, self.prompt), self.like, self.prompt)


def _sized(shape: HeadPattern, seen: Sequence[_Scored], density: float) -> list[HeadPattern]:
    """For each head, the largest of a shape's sizes whose density stays within the target."""
    heads, tokens = seen[0].like.shape[1], max(one.prompt.kv_len for one in seen)
    below, over = torch.zeros(heads, dtype=torch.int64), torch.full((heads,), STEPS)
    if bool((_density(shape, below, seen, tokens) > density).any()):
        raise ValueError(
            f"The guards and the least {shape.type} pattern compute more than density={density}: raise it, or take "
            "longer texts."
        )
    while bool((over - below > 1).any()):  # all heads at once
        middle = (below + over) // 2
        within = _density(shape, middle, seen, tokens) <= density
        below, over = torch.where(within, middle, below), torch.where(within, over, middle)
    return _at(shape, below, tokens)


def _density(shape: HeadPattern, steps: Tensor, seen: Sequence[_Scored], tokens: int) -> Tensor:
    """Density of each head at its step, mean over the texts: [Hq]."""
    patterns = _at(shape, steps, tokens)
    found = [evaluation.density(one.keep(patterns), one.prompt)[0] for one in seen]
    return torch.stack([density.cpu() for density in found]).mean(0)


def _at(shape: HeadPattern, steps: Tensor, tokens: int) -> list[HeadPattern]:
    """A shape's sizes for each head at its step."""
    least = 1 if shape.type == "block_sparse" else 0
    smallest = min(size for size in shape[1:3] if size)
    out = []
    for step in steps.tolist():
        factor = 0.01 * (100 * tokens / smallest) ** (step / STEPS)
        sizes = [max(least, min(tokens, round(factor * size))) if size else 0 for size in shape[1:3]]
        out.append(HeadPattern(shape.type, *sizes))
    return out


def _closest(candidates: Sequence[Sequence[HeadPattern]], errors: Tensor) -> dict[int, HeadPattern]:
    """The candidate of the least error for each head; of equal ones the first."""
    best = errors.argmin(0).tolist()
    found = {}
    for head, index in enumerate(best):
        score = round(1 - float(errors[index, head]), 6)
        found[head] = candidates[index][head]._replace(score=score)
    return found

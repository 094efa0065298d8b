"""MInference's search of patterns: for each head the candidate, of one cost, with the smallest output error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparse_prefill import evaluation
from sparse_prefill.core.option_checks import check_fraction, check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.eval_model import EvalModel, LayerInputs
from sparse_prefill.models.observe import OnProgress, Texts, observe, part_of
from sparse_prefill.strategies.minference import HeadPattern, MInference

# The candidates of the paper. The search scales their sizes until their cost is the target.
SHAPES = (
    HeadPattern("stream_llm", 1024, 4096),
    HeadPattern("vertical_and_slash", 30, 2048),
    HeadPattern("vertical_and_slash", 100, 1800),
    HeadPattern("vertical_and_slash", 500, 1500),
    HeadPattern("vertical_and_slash", 3000, 200),
    HeadPattern("block_sparse", 100, 0),
)
SIZE_STEPS = 2**10  # from 1 % of a candidate's sizes to the whole prompt
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
    """Find a pattern for each head as in the paper of MInference (https://arxiv.org/abs/2407.02490, algorithm 1).

    Both sizes of a candidate are scaled together, head by head, to the largest whose cost stays within the target. The
    cost is the share of blocks that the head computes, guards included. The head gets the candidate whose attention
    output is closest to that of dense attention, in the norm of the difference. Texts run through the model twice.
    Layers with sliding windows get patterns, too; these have no effect if the windows run dense in use.

    Args:
        subject (EvalModel): the model.
        texts (Sequence): token ids of sample texts, as long as the prompts to come: sizes are in tokens.
        density (float): cost of every candidate, in (0, 1]. Default: 0.25.
        shapes (Sequence[HeadPattern]): the candidates. Default: those of the paper.
        strategy (MInference | None): guards, block size and last queries. Default: those of ``minference``.
        query_blocks (int): number of query blocks of each text in which outputs are compared. Default: 8.
        on_progress (Callable | None): called as ``on_progress(done, total)`` after each layer. Default: nothing.

    Returns:
        list[dict[int, HeadPattern]]: a pattern of each query head by layer, with the score 1 minus the relative output
        error. :func:`~sparse_prefill.strategies.minference.save_patterns` writes them for
        ``get_strategy("minference", config=path)``.

    Raises:
        ValueError: if an option is out of range, a text runs dense, or the guards cost more than ``density``.

    Example:
        >>> save_patterns("patterns.json", search_patterns(model, [model.encode(text)]))
    """
    check_fraction("density", density)
    check_tokens("query_blocks", query_blocks, least=1)
    strategy = MInference() if strategy is None else strategy
    if strategy.config is not None or strategy.heads:
        raise ValueError("The search finds the patterns of all heads: drop config and heads of the strategy.")
    if not shapes:
        raise ValueError("shapes must hold at least one candidate, got none.")
    layers: dict[int, _LayerSearch] = {}

    def score(text: int, inputs: LayerInputs) -> None:
        search = layers.setdefault(inputs.layer, _LayerSearch(strategy, shapes, density, query_blocks))
        search.score(inputs)

    def compare(text: int, inputs: LayerInputs) -> None:
        layers[inputs.layer].compare(text, inputs)

    with torch.inference_mode():
        observe(subject, strategy, texts, score, part_of(on_progress, 0, 2))
        observe(subject, strategy, texts, compare, part_of(on_progress, 1, 2))
    return [layers[index].best() for index in sorted(layers)]


@dataclass(eq=False)
class _LayerSearch:
    """The search in one layer: score every text, scale the candidates, compare their outputs, choose."""

    strategy: MInference
    shapes: Sequence[HeadPattern]
    density: float
    query_blocks: int
    texts: list[_ScoredText] = field(default_factory=list)
    candidates: list[list[HeadPattern]] = field(default_factory=list)  # [shapes][heads], scaled to the density
    errors: Tensor | int = 0  # fp64 [shapes, Hq], sums over the texts

    def score(self, inputs: LayerInputs) -> None:
        """Score a text for patterns of all types."""
        columns, blocks = (
            replace(self.strategy, pattern=name).score(inputs.q, inputs.k, inputs.prompt)
            for name in ("vertical_and_slash", "block_sparse")
        )
        scores = columns._replace(pooled=blocks.pooled)
        like = inputs.q.new_empty(()).expand(inputs.q.shape)
        self.texts.append(_ScoredText(self.strategy, scores, like, inputs.prompt))

    def compare(self, text: int, inputs: LayerInputs) -> None:
        """Add the output errors of all candidates on a text, once all texts are scored."""
        if not self.candidates:
            self.candidates = [_scaled(shape, self.texts, self.density) for shape in self.shapes]
        keeps = [self.texts[text].keep(patterns) for patterns in self.candidates]
        self.errors = self.errors + output_errors(inputs, keeps, self.query_blocks)

    def best(self) -> dict[int, HeadPattern]:
        """For each head the candidate with the smallest error, the first one of equals."""
        assert isinstance(self.errors, Tensor)
        errors = self.errors / len(self.texts)
        found = {}
        for head, index in enumerate(errors.argmin(0).tolist()):
            score = round(1 - float(errors[index, head]), 6)
            found[head] = self.candidates[index][head]._replace(score=score)
        return found


def output_errors(inputs: LayerInputs, keeps: Sequence[Tensor], query_blocks: int) -> Tensor:
    """The error of each table's attention output relative to dense attention, over some query blocks.

    The exact output is split by key block once, so that further tables cost little.

    Args:
        inputs (LayerInputs): a layer.
        keeps (Sequence[Tensor]): keep tables, bool [1, Hq or 1, n_q, n_k] each.
        query_blocks (int): number of query blocks to compare.

    Returns:
        Tensor: norm of the difference over that of the dense output, fp64 [tables, Hq].
    """
    heads, device = inputs.q.shape[1], inputs.q.device
    difference = torch.zeros(len(keeps), heads, dtype=torch.float64, device=device)
    norm = torch.zeros(heads, dtype=torch.float64, device=device)
    for block in evaluation.spread_blocks(inputs.prompt.n_q, query_blocks):
        parts, mass = _parts(inputs, block)  # [Hq, m, n_k, Dv], [Hq, m, n_k]
        dense = parts.sum(2)
        norm += dense.double().square().sum((1, 2))
        each = []
        for keep in keeps:
            kept = keep[0, :, block, None].expand(len(parts), 1, -1).float()  # [Hq, 1, n_k]
            out = (parts * kept[..., None]).sum(2) / (mass * kept).sum(2, keepdim=True).clamp(min=1e-30)
            each.append((out - dense).double().square().sum((1, 2)))
        difference += torch.stack(each)
    if not bool(norm.isfinite().all()):
        raise ValueError("The model's attention isn't finite: try another dtype.")
    return (difference / norm.clamp(min=1e-30)).sqrt()


def _parts(inputs: LayerInputs, block: int) -> tuple[Tensor, Tensor]:
    """Each key block's part of the output of a query block, [Hq, m, n_k, Dv], and its probability mass [Hq, m, n_k]."""
    prompt, size = inputs.prompt, inputs.prompt.block_size
    positions = prompt.query_positions(inputs.q.device)[block * size : (block + 1) * size]
    group = inputs.q.shape[1] // inputs.k.shape[1]
    q = inputs.q[0, :, block * size : (block + 1) * size].float().unflatten(0, (-1, group))  # [Hkv, G, m, D]
    k, v = inputs.k[0].float()[:, None], inputs.v[0].float()[:, None]
    allowed = prompt.may_attend(positions, torch.arange(prompt.kv_len, device=q.device))[0, 0]
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    probability = logits.masked_fill(~allowed, -torch.inf).softmax(-1)  # [Hkv, G, m, N]
    ragged = prompt.n_k * size - prompt.kv_len
    probability = torch.nn.functional.pad(probability, (0, ragged)).unflatten(-1, (prompt.n_k, size))
    v = torch.nn.functional.pad(v, (0, 0, 0, ragged)).unflatten(2, (prompt.n_k, size))  # [Hkv, 1, n_k, size, Dv]
    parts = (probability.transpose(2, 3) @ v).transpose(2, 3)  # [Hkv, G, m, n_k, Dv]
    return parts.flatten(0, 1), probability.sum(-1).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class _ScoredText:
    """Scores of one layer for one text."""

    strategy: MInference
    scores: Any  # for patterns of all types
    like: Tensor  # has the shape and the device of the queries, without their memory
    prompt: Prompt

    def keep(self, patterns: Sequence[HeadPattern]) -> Tensor:
        """The keep table with one pattern for each head: bool [1, Hq, n_q, n_k]."""
        strategy = replace(self.strategy, heads=dict(enumerate(patterns)))
        return strategy.guarded(strategy.select(self.scores, self.prompt), self.like, self.prompt)


def _scaled(shape: HeadPattern, texts: Sequence[_ScoredText], density: float) -> list[HeadPattern]:
    """For each head, the largest scale of a shape whose density stays within the target."""
    heads, tokens = texts[0].like.shape[1], max(text.prompt.kv_len for text in texts)
    below, over = torch.zeros(heads, dtype=torch.int64), torch.full((heads,), SIZE_STEPS)
    if bool((_density(shape, below, texts, tokens) > density).any()):
        raise ValueError(
            f"The guards and the smallest {shape.type} pattern compute more than density={density}: raise it, or take "
            "longer texts."
        )
    while bool((over - below > 1).any()):  # all heads at once
        middle = (below + over) // 2
        within = _density(shape, middle, texts, tokens) <= density
        below, over = torch.where(within, middle, below), torch.where(within, over, middle)
    return _patterns_at(shape, below, tokens)


def _density(shape: HeadPattern, steps: Tensor, texts: Sequence[_ScoredText], tokens: int) -> Tensor:
    """Density of each head with a shape at its step, mean over the texts: [Hq]."""
    patterns = _patterns_at(shape, steps, tokens)
    found = [evaluation.density(text.keep(patterns), text.prompt)[0] for text in texts]
    return torch.stack([density.cpu() for density in found]).mean(0)


def _patterns_at(shape: HeadPattern, steps: Tensor, tokens: int) -> list[HeadPattern]:
    """A shape, scaled for each head to its step."""
    least = 1 if shape.type == "block_sparse" else 0
    smallest = min(size for size in shape[1:3] if size)
    out = []
    for step in steps.tolist():
        factor = 0.01 * (100 * tokens / smallest) ** (step / SIZE_STEPS)
        sizes = [max(least, min(tokens, round(factor * size))) if size else 0 for size in shape[1:3]]
        out.append(HeadPattern(shape.type, *sizes))
    return out

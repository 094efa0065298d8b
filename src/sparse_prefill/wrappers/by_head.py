"""Different strategies for the heads of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.core.layer import Layer
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.registry import register_wrapper
from sparse_prefill.strategy import Strategy, as_strategy
from sparse_prefill.wrappers.base import Wrapper


@register_wrapper("by_head")
@dataclass(frozen=True, kw_only=True)
class ByHead(Wrapper):
    """Give some query heads their own strategies, and all others the wrapped one.

    Each strategy is called once, with only its own heads and their keys. A key head is passed once if all of its query
    heads have the same strategy. A strategy whose options number the heads, such as a head table, gets all heads of the
    layer. In chunks, a head selects the same blocks as in one piece if its strategy does.

    Args:
        of (Strategy | str | Mapping): strategy of the heads that aren't listed.
        heads (Mapping[int, Strategy | str | Mapping]): strategies of some query heads, by their index. All must have
            the block size of ``of``. Default: none.

    Raises:
        ValueError: if a head's index is negative, or its strategy has another block size or changes more than the block
            mask (then put it around ``by_head``); at a call, if there is no such head.
    """

    paper = "no paper: methods that choose a pattern for each head can be written with it"
    use = """
Take it for models whose heads are known to differ: cheap strategies for heads that only look at the first and the
nearest tokens, and careful ones or `dense` for the others. In the layers of a `Plan`, it gives each head of each layer
a strategy. Heads of equal strategies are estimated together; each different strategy costs a call. Heads that share a
key head may differ. `duo_attention` reads such a choice from a table.
"""
    differs = "There is no released code."

    heads: Mapping[int, Strategy] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.heads, Mapping):
            raise ValueError(f"heads must be a mapping from heads to strategies, got {self.heads!r}.")
        heads = {head: as_strategy(strategy) for head, strategy in self.heads.items()}
        object.__setattr__(self, "heads", heads)
        for head, strategy in heads.items():
            if isinstance(head, bool) or not isinstance(head, int) or head < 0:
                raise ValueError(f"heads must be numbered from 0, got {head!r}.")
            if strategy.block_size != self.block_size:
                raise ValueError(
                    f"All heads of a layer share one block size, got {strategy.block_size} for head {head} and "
                    f"{self.block_size} for the others."
                )
        for strategy in (self.of, *heads.values()):
            inner = strategy
            while isinstance(inner, Wrapper) and type(inner).attend is Wrapper.attend:
                inner = inner.of
            if type(inner).attend is not Strategy.attend:
                raise ValueError(
                    f"{strategy.label} changes the attention output and not only the block mask, so it can't serve "
                    "single heads: put it around by_head."
                )

    def for_layer(self, layer: Layer) -> Strategy:
        heads = {head: strategy.for_layer(layer) for head, strategy in self.heads.items()}
        return replace(self, of=self.of.for_layer(layer), heads=heads)

    def for_heads(self, heads: slice, key_heads: slice) -> Strategy | None:
        of, own = self.of.for_heads(heads, key_heads), {}
        for head, strategy in self.heads.items():
            if heads.start <= head < heads.stop:
                bound = strategy.for_heads(heads, key_heads)
                if bound is None:
                    return None
                own[head - heads.start] = bound
        if of is None:
            return None
        return replace(self, of=of, heads=own)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> list[tuple[Strategy, list[int], Any]]:
        groups = self._groups(q.shape[1])
        return [(strategy, heads, strategy.score(*_shown(strategy, q, k, heads, prompt))) for strategy, heads in groups]

    def select(self, scores: list[tuple[Strategy, list[int], Any]], prompt: Prompt) -> Tensor:
        return _over_heads([(s, heads, s.select(part, prompt)) for s, heads, part in scores], prompt)

    def score_table(self, scores: list[tuple[Strategy, list[int], Any]], prompt: Prompt) -> Tensor:
        return _over_heads([(s, heads, s.score_table(part, prompt).float()) for s, heads, part in scores], prompt)

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        prompt = self.prompt_for(q, k, prompt)
        groups = self._groups(q.shape[1])
        return _over_heads([(s, heads, s.keep(*_shown(s, q, k, heads, prompt))) for s, heads in groups], prompt)

    @property
    def indexes_heads(self) -> bool:
        return bool(self.heads) or self.of.indexes_heads

    @property
    def shares_across_layers(self) -> bool:
        return any(strategy.shares_across_layers for strategy in (self.of, *self.heads.values()))

    def _groups(self, count: int) -> list[tuple[Strategy, list[int]]]:
        """Each strategy with its heads."""
        beyond = [head for head in self.heads if head >= count]
        if beyond:
            raise ValueError(f"There is no head {beyond[0]}: q has {count} heads, numbered from 0.")
        groups: list[tuple[Strategy, list[int]]] = []
        for head in range(count):
            strategy = self.heads.get(head, self.of)
            for other, heads in groups:
                if other == strategy:
                    heads.append(head)
                    break
            else:
                groups.append((strategy, [head]))
        return groups


def _shown(strategy: Strategy, q: Tensor, k: Tensor, heads: list[int], prompt: Prompt) -> tuple[Tensor, Tensor, Prompt]:
    """The queries and keys that a strategy gets; a key head is passed once if all of its query heads are with it."""
    if strategy.indexes_heads:
        return q, k, prompt
    group = q.shape[1] // k.shape[1]
    keys = sorted({head // group for head in heads})
    if heads != [key * group + i for key in keys for i in range(group)]:
        keys = [head // group for head in heads]
    own = None if prompt.state is None else prompt.state.part(tuple(keys))
    return _take(q, heads), _take(k, keys), prompt.with_state(own)


def _take(x: Tensor, indices: list[int]) -> Tensor:
    """Some heads of x [B, H, n, D]; a view if they are adjacent, since a copy of 128K tokens takes a gigabyte."""
    first, last = indices[0], indices[-1]
    if indices == list(range(first, last + 1)):
        return x[:, first : last + 1]
    return torch.stack([x[:, i] for i in indices], dim=1)  # several times faster than indexing on a CPU


def _over_heads(parts: list[tuple[Strategy, list[int], Tensor]], prompt: Prompt) -> Tensor:
    """The tables of groups of heads as one table of all heads: [B, Hq, n_q, n_k]."""
    batch = max(table.shape[0] for *_, table in parts)
    count = sum(len(heads) for _, heads, _ in parts)
    first = parts[0][-1]
    out = torch.empty(batch, count, prompt.n_q, prompt.n_k, dtype=first.dtype, device=first.device)
    for strategy, heads, table in parts:
        of_all = strategy.indexes_heads and table.shape[1] > 1
        for place, head in enumerate(heads):  # a GPU would wait for a list of indices
            out[:, head] = table[:, head if of_all else place % table.shape[1]]
    return out

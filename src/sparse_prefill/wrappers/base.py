"""A strategy around another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.layer import Layer
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.kernel.segments import Segment
from sparse_prefill.strategy import Strategy, as_strategy


@dataclass(frozen=True, kw_only=True)
class Wrapper(Strategy):
    """Base of all wrappers: it does what the wrapped strategy does, and subclasses override a part of that.

    Block size, minimum length and the rule for decoding are those of the wrapped strategy, which also applies its own
    guards. If a call runs dense, a wrapper that overrides :meth:`attend` is called with a table of all visible blocks;
    override :meth:`attend_dense` to do less there.

    Args:
        of (Strategy | str | Mapping): what to wrap: a strategy, its name, or a mapping of its name and options.

    Raises:
        ValueError: if ``of`` is no strategy.
    """

    of: Strategy

    block_size: int = field(init=False, repr=False, default=128)
    min_length: int | None = field(init=False, repr=False, default=None)
    sink: int = field(init=False, repr=False, default=0)
    local: int = field(init=False, repr=False, default=0)
    last: int = field(init=False, repr=False, default=0)
    max_decode_queries: int = field(init=False, repr=False, default=32)

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", as_strategy(self.of))
        object.__setattr__(self, "block_size", self.of.block_size)
        object.__setattr__(self, "min_length", self.of.min_length)
        object.__setattr__(self, "max_decode_queries", self.of.max_decode_queries)

    @property
    def label(self) -> str:
        return f"{self.name}({self.of.label})"

    @property
    def indexes_heads(self) -> bool:
        return self.of.indexes_heads

    @property
    def shares_across_layers(self) -> bool:
        return self.of.shares_across_layers

    def for_layer(self, layer: Layer) -> Strategy:
        return self.with_fields(of=self.of.for_layer(layer))

    def for_heads(self, heads: slice, key_heads: slice) -> Strategy | None:
        of = self.of.for_heads(heads, key_heads)
        return None if of is None else self.with_fields(of=of)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Any:
        return self.of.score(q, k, prompt)

    def select(self, scores: Any, prompt: Prompt) -> Tensor:
        return self.of.select(scores, prompt)

    def score_table(self, scores: Any, prompt: Prompt) -> Tensor:
        return self.of.score_table(scores, prompt)

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        return self.of.keep(q, k, prompt)

    def attend(self, inputs: AttentionInputs, keep: Tensor, segments: Sequence[Segment] = ()) -> Tensor:
        return self.of.attend(inputs, keep, segments)

    def attend_dense(self, inputs: AttentionInputs) -> Tensor:
        """Attention over everything, changed as :meth:`attend` changes it where a wrapper does."""
        if type(self).attend is Wrapper.attend:
            return self.of.attend_dense(inputs)
        everything = inputs.prompt.visible(inputs.q.device).expand(*inputs.q.shape[:2], -1, -1)
        return self.attend(inputs, everything)

    def dense_reason(self, prompt: Prompt, device: str | torch.device = "cpu") -> str | None:
        return self.of.dense_reason(prompt, device)

"""The queries, keys and values of each layer of a dense run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.layer import Layer
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.kernel.segments import Segment
from sparse_prefill.strategy import Strategy


class LayerInputs(NamedTuple):
    """What one layer attends with in a dense run.

    Args:
        layer (int): index of the layer.
        strategy (Strategy): the observed strategy, bound to the layer. The run itself is dense.
        q (Tensor): queries as strategies score them, [1, Hq, s, D].
        k (Tensor): keys, likewise, [1, Hkv, s, D].
        v (Tensor): values [1, Hkv, s, Dv].
        prompt (Prompt): what the tokens are, with the layer's sliding window.
    """

    layer: int
    strategy: Strategy
    q: Tensor
    k: Tensor
    v: Tensor
    prompt: Prompt


@dataclass(frozen=True, kw_only=True)
class Observer(Strategy):
    """Dense attention that passes its inputs to a function, at all lengths.

    Args:
        of (Strategy): the strategy to bind to each layer.
        look (Callable): called as ``look(inputs)`` by one layer after the other.
        every (int): call it in one layer in this many, from the first on. Default: 1.
    """

    of: Strategy
    look: Callable[[LayerInputs], None]
    every: int = 1
    index: int = 0

    def for_layer(self, layer: Layer) -> Strategy:
        return replace(self, of=self.of.for_layer(layer), index=layer.index)

    def dense_reason(self, prompt: Prompt, device: str | torch.device = "cpu") -> str | None:
        return None  # short prompts are passed on, too

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        return self.prompt_for(q, k, prompt).visible(q.device)

    def attend(self, inputs: AttentionInputs, keep: Tensor, segments: Sequence[Segment] = ()) -> Tensor:
        if self.index % self.every == 0:
            qkv = (inputs.scored_q, inputs.scored_k, inputs.v)
            self.look(LayerInputs(self.index, self.of, *qkv, inputs.prompt))
        return self.attend_dense(inputs)

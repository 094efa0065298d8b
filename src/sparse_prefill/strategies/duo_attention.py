"""DuoAttention: some heads read everything, the others the first and the nearest tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_prefill import registry
from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_nonnegative
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.head_table import HeadTable, check_table, load_table, streaming_heads
from sparse_prefill.registry import register_strategy
from sparse_prefill.strategies._by_options import ByOptions
from sparse_prefill.strategies.a_shape import AShape
from sparse_prefill.strategies.dense import Dense
from sparse_prefill.strategy import Strategy, as_strategy
from sparse_prefill.wrappers.by_head import ByHead


@register_strategy("duo_attention")
@dataclass(frozen=True, kw_only=True)
class DuoAttention(AShape):
    """DuoAttention: retrieval heads read everything, streaming heads the first and the nearest tokens.

    A head table gives each layer and key head a number: how much the model needs this head to see the whole context.
    Heads under the ``sparsity`` quantile of the whole table are streaming heads, all others retrieval heads. The query
    heads of a key head have its pattern. Nothing is estimated at run time, and the pattern is the same for every
    prompt.

    The table is trained once for each model, or estimated: :func:`~sparse_prefill.head_table.window_loss` gives one row
    from the queries and keys of a layer. Models bind each layer to its row by :meth:`for_layer`. Unbound and without
    ``streaming``, every head is a streaming head. Retrieval heads may run any ``retrieval`` strategy that changes only
    the block mask.

    The window is rounded out to whole blocks. A prompt in chunks of whole blocks selects the same blocks as in one
    piece if ``retrieval`` does.

    Args:
        table (str | Sequence[Sequence[float]] | None): a number for each layer and key head, higher for heads that
            need more than a window: nested lists, or the path of a file of tab-separated numbers, as published, or of
            YAML. :meth:`for_layer` reads files. Default: None, which only works without a model.
        sparsity (float): share of the heads that stream; 1 or more for all, 0 for none. Of heads with equal numbers,
            the later ones stream. Published: 0.5 with grouped heads, 0.75 without. Default: 0.5.
        retrieval (Strategy | str | Mapping): strategy of the retrieval heads. Given by name, it takes over
            ``block_size``. The guards here don't apply to it. Default: "dense".
        streaming (Sequence[bool] | None): which key heads of the one layer stream, in place of a table; set by
            :meth:`for_layer`. Default: None.
        sink (int): first tokens that streaming heads keep. Default: 128.
        local (int): nearest keys that streaming heads keep. Default: 256.
        **guards: see :class:`~sparse_prefill.Strategy`; they are those of the streaming heads.

    Raises:
        ValueError: if an option is out of range, or ``retrieval`` has another block size or changes more than the
            block mask; in ``for_layer``, if there is no table or it doesn't fit the model; at a call, if the number of
            heads doesn't fit the table.
    """

    paper = "DuoAttention, Xiao et al. (arXiv 2410.10819)"
    reference = "mit-han-lab/duo-attention@fe93c31: prefill of the evaluation"
    use = """
Take it for a model with a published table, or make a table: `window_loss` estimates a row for each layer from your own
long prompts. The method needs no estimate at run time and is the same for every prompt, so you can test it once. At a
sparsity of 0.5 with `retrieval="dense"`, half of the attention stays dense; another strategy for the retrieval heads
saves time there, too. An estimated table ranks heads by where they look, a trained one by what the model loses. Measure
an estimated one before you rely on it.

```yaml
name: duo_attention
table: heads.tsv        # a line for each layer, a number for each key head
sparsity: 0.5
retrieval: flex_prefill
```
"""
    differs = """
In the released evaluation, the first chunk of a prompt is dense in all heads. In later chunks, streaming heads read the
first tokens, the last 256 tokens before the chunk, and the whole chunk. So a prompt in one piece isn't sparse there,
and a chunk's own length adds to the window. Here each query has the window of the table's training, rounded out to
blocks, in one piece and in chunks alike, so less is kept. Keys and values of streaming heads stay in the cache: no
memory is saved, and decoding is dense.

Equal numbers rank by their place; the released code adds noise. Heads stay in their order; the released code moves
retrieval heads to the front. Its script for needle tests keeps 64 first tokens; the 128 here are those of the training.
The published tables aren't part of this package, which reads their files as they are.
"""
    chunk_invariant = ByOptions(True, lambda self: self.retrieval.chunk_invariant)
    crossover = 2048
    tunable = None  # the table is one for all layers: calibration.estimate_head_table

    table: str | Path | Sequence[Sequence[float]] | None = None
    sparsity: float = 0.5
    retrieval: Strategy | str | Mapping[str, Any] = "dense"
    streaming: Sequence[bool] | None = None
    sink: int = 128
    local: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.table, (str, Path)):
            object.__setattr__(self, "table", str(self.table))
        elif self.table is not None:
            object.__setattr__(self, "table", check_table(self.table))
        check_nonnegative("sparsity", self.sparsity)
        if self.streaming is not None:
            object.__setattr__(self, "streaming", _flags(self.streaming))
        retrieval = _in_blocks(self.retrieval, self.block_size)
        object.__setattr__(self, "retrieval", retrieval)
        ByHead(of=self._window(), heads={0: retrieval})  # raises if it can't serve single heads

    @property
    def indexes_heads(self) -> bool:
        return self.table is not None or self.streaming is not None

    def for_layer(self, layer: Layer) -> Strategy:
        retrieval = as_strategy(self.retrieval).for_layer(layer)
        if self.table is None and self.streaming is not None:
            return replace(self, retrieval=retrieval)
        if self.table is None:
            raise ValueError(
                f"{self.name} needs a table that says for each layer and key head how much it needs the whole context: "
                "give a published or a trained one, or estimate one by sparse_prefill.head_table.window_loss."
            )
        table: HeadTable = load_table(self.table) if isinstance(self.table, (str, Path)) else check_table(self.table)
        if len(table) != layer.count:
            raise ValueError(
                f"The table of {self.name} has {len(table)} layers and the model {layer.count}: give that of the model."
            )
        return replace(self, retrieval=retrieval, streaming=streaming_heads(table, self.sparsity)[layer.index])

    def for_heads(self, heads: slice, key_heads: slice) -> Strategy | None:
        retrieval = as_strategy(self.retrieval).for_heads(heads, key_heads)
        if retrieval is None or self.table is not None:
            return None
        streaming = None if self.streaming is None else self.streaming[key_heads]
        return replace(self, retrieval=retrieval, streaming=streaming)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Any:
        return self._by_head(q, k).score(q, k, prompt)

    def select(self, scores: Any, prompt: Prompt) -> Tensor:
        return ByHead(of=self._window()).select(scores, prompt)  # scores know their heads

    def score_table(self, scores: Any, prompt: Prompt) -> Tensor:
        return ByHead(of=self._window()).score_table(scores, prompt)

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        return self._by_head(q, k).keep(q, k, prompt)

    def dense_reason(self, prompt: Prompt, device: str | torch.device = "cpu") -> str | None:
        reason = super().dense_reason(prompt, device)
        if reason is None and isinstance(self.retrieval, Dense) and prompt.kv_len <= self.sink + self.local:
            return "window"  # that holds the prompt
        return reason

    def _window(self) -> AShape:
        return AShape(block_size=self.block_size, sink=self.sink, local=self.local, last=self.last)

    def _by_head(self, q: Tensor, k: Tensor) -> ByHead:
        """Each query head's strategy."""
        group = q.shape[1] // k.shape[1]
        streaming = (True,) * k.shape[1] if self.streaming is None else self.streaming
        if len(streaming) != k.shape[1]:
            raise ValueError(
                f"{self.name} knows which of {len(streaming)} key heads stream, but k has {k.shape[1]} heads: give "
                "the table of this model."
            )
        heads = {head: self.retrieval for head in range(q.shape[1]) if not streaming[head // group]}
        return ByHead(of=self._window(), heads=heads)  # type: ignore[arg-type]  # strategies once built


def _flags(streaming: Sequence[bool]) -> tuple[bool, ...]:
    flags = tuple(streaming) if isinstance(streaming, (list, tuple)) else ()
    if not flags or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"streaming must be True or False for each key head, got {streaming!r}.")
    return flags


def _in_blocks(value: Strategy | str | Mapping[str, Any], block_size: int) -> Strategy:
    """A strategy, which takes over ``block_size`` where it is given by its name and doesn't say otherwise."""
    config: Any = {"name": value} if isinstance(value, str) else value
    name = config.get("name") if isinstance(config, Mapping) else None
    if isinstance(name, str) and name in registry.strategies and "block_size" in registry.strategies.options(name):
        config = {"block_size": block_size, **config}
    return as_strategy(config)

"""The tables of some layers for the layers that follow them, too."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.prompt_cache import CacheKey
from sparse_prefill.registry import register_wrapper
from sparse_prefill.strategy import Strategy
from sparse_prefill.wrappers.base import Wrapper


class Left(NamedTuple):
    """What a source layer leaves with the prompt: its number and its table."""

    source: int
    keep: Tensor


@register_wrapper("reuse_layer")
@dataclass(frozen=True, kw_only=True)
class ReuseLayer(Wrapper):
    """Select in some layers only, the sources, and let each layer behind one reuse its table.

    A source leaves its table with the prompt, for the layers up to the next source. Every layer still attends with its
    own queries, keys and values. Layers have to run in their order and take the same
    :class:`~sparse_prefill.Prompt`, as they do in a model; all sources and reusing layers must be served by the same
    ``reuse_layer``, e.g. as the default of a plan. Head by head, a table is that of the head of the same number.
    Without a model it selects by itself in each call.

    Args:
        of (Strategy | str | Mapping): what to wrap: a strategy, its name, or a mapping of its name and options. All
            layers must have one block size.
        every (int): layers 0, ``every``, 2 ``every`` and so on are sources. Default: 4.
        sources (tuple[int, ...] | None): numbers of the source layers, instead of ``every``. Layers before the first
            select by themselves. Default: None.

    Raises:
        ValueError: if an option is out of range; for a model, if it has no layer of such a number; at a call, if the
            source layer left no table with the prompt.
    """

    paper = "no paper of its own; related: IndexCache, 2026 (arXiv 2603.12201)"
    use = (
        "Take it where selecting costs much next to attending, as it does for short prompts and for strategies that "
        "score finely. Heads of the same number needn't look at the same places in neighbouring layers, so measure the "
        "recall of the reusing layers. Static patterns such as `a_shape` gain nothing."
    )
    differs = "There is no released code that it follows."

    every: int = 4
    sources: tuple[int, ...] | None = None

    # The wrapper that was built for the whole model: those of its layers leave tables for each other alone.
    _family: object = field(init=False, repr=False, compare=False, default=None)
    _layer: int | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("every", self.every, least=1)
        if self.sources is not None:
            sources = self.sources if isinstance(self.sources, (list, tuple)) else (self.sources,)
            for source in sources:
                check_tokens("each of sources", source)
            if not sources:
                raise ValueError("sources must name at least one layer, got none.")
            object.__setattr__(self, "sources", tuple(sorted(set(sources))))
        object.__setattr__(self, "_family", object())

    @property
    def shares_across_layers(self) -> bool:
        return self._layer is not None or self.of.shares_across_layers

    def for_layer(self, layer: Layer) -> Strategy:
        beyond = [source for source in self.sources or () if source >= layer.count]
        if beyond:
            raise ValueError(f"sources names layer {beyond[0]}, but the model has {layer.count} layers.")
        bound = replace(self, of=self.of.for_layer(layer))
        object.__setattr__(bound, "_family", self._family)
        object.__setattr__(bound, "_layer", layer.index)
        return bound

    def for_heads(self, heads: slice, key_heads: slice) -> None:
        return None  # a source leaves one table for all heads

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        prompt = self.prompt_for(q, k, prompt)
        source = self._source()
        if source is None:
            return super().keep(q, k, prompt)
        key = CacheKey("reused table", q.device, (self._family,))
        if source == self._layer:
            keep = super().keep(q, k, prompt)
            prompt.cache.put(key, Left(source, keep))
            return keep
        left: Left | None = prompt.cache.find(key)
        if left is None or left.source != source:
            raise ValueError(
                f"Layer {self._layer} reuses the table of layer {source}, which left none with this prompt: run the "
                "layers in order with one Prompt of one block size, give both layers the same reuse_layer, or name "
                f"layer {self._layer} in sources if layer {source} runs dense."
            )
        return left.keep

    def _source(self) -> int | None:
        """The layer whose table serves this one, None where there is none."""
        if self._layer is None:
            return None
        if self.sources is None:
            return self._layer // self.every * self.every
        return max((source for source in self.sources if source <= self._layer), default=None)

"""The block masks of some layers, reused by the layers that follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.prompt_cache import CacheKey
from sparse_prefill.registry import register_wrapper
from sparse_prefill.strategy import Strategy
from sparse_prefill.wrappers.base import Wrapper


class SharedMask(NamedTuple):
    """The block mask that a source layer leaves with the prompt, and the number of that layer."""

    source: int
    keep: Tensor


@register_wrapper("reuse_layer")
@dataclass(frozen=True, kw_only=True)
class ReuseLayer(Wrapper):
    """Select in some layers only, the sources, and reuse their block masks in the layers that follow.

    A source stores its mask with the prompt, for the layers up to the next source. Every layer still attends with its
    own queries, keys and values. Each head reuses the mask of the head with the same number. Layers have to run in
    order and with the same :class:`~sparse_prefill.Prompt`, as they do in a model. All of them must have the same
    ``reuse_layer``, e.g. as the default of a plan. Without a model, each call selects its own mask.

    Args:
        of (Strategy | str | Mapping): what to wrap: a strategy, its name, or a mapping of its name and options. All
            layers must have one block size.
        every (int): layers 0, ``every``, 2 ``every`` and so on are sources. Default: 4.
        sources (tuple[int, ...] | None): numbers of the source layers, instead of ``every``. Layers before the first
            select their own masks. Default: None.

    Raises:
        ValueError: if an option is out of range; for a model, if it has no layer of such a number; at a call, if the
            source layer left no mask with the prompt.
    """

    paper = "no paper; related: IndexCache, 2026 (arXiv 2603.12201)"
    use = (
        "Take it if selection costs much compared with attention, as for short prompts and for strategies that "
        "score finely. Heads of the same number needn't look at the same places in neighbouring layers, so measure the "
        "recall of the reusing layers. Static patterns such as `a_shape` gain nothing."
    )
    differs = "There is no released code of it."

    every: int = 4
    sources: tuple[int, ...] | None = None

    # Tells this wrapper and its layers from another wrapper of equal options: each family shares its own masks only.
    family: object = field(init=False, repr=False, compare=False, default_factory=object)

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

    def for_layer(self, layer: Layer) -> Strategy:
        beyond = [source for source in self.sources or () if source >= layer.count]
        if beyond:
            raise ValueError(f"sources names layer {beyond[0]}, but the model has {layer.count} layers.")
        of = self.of.for_layer(layer)
        return _ReusingLayer(of=of, every=self.every, sources=self.sources, family=self.family, layer=layer.index)

    def for_heads(self, heads: slice, key_heads: slice) -> None:
        return None  # a source leaves one mask for all heads


@dataclass(frozen=True, kw_only=True)
class _ReusingLayer(ReuseLayer):
    """:class:`ReuseLayer` in one layer of a model: its ``layer``, and the ``family`` of the wrapper that made it."""

    family: object = field(repr=False, compare=False)
    layer: int

    @property
    def shares_across_layers(self) -> bool:
        return True

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        prompt = self.prompt_for(q, k, prompt)
        source = self._source()
        if source is None:
            return super().keep(q, k, prompt)
        key = CacheKey("reused mask", q.device, (self.family,))
        if source == self.layer:
            keep = super().keep(q, k, prompt)
            prompt.cache.put(key, SharedMask(source, keep))
            return keep
        shared: SharedMask | None = prompt.cache.find(key)
        if shared is None or shared.source != source:
            raise ValueError(
                f"Layer {self.layer} reuses the block mask of layer {source}, which left none with this prompt: run "
                "the layers in order with one Prompt of one block size, give both layers the same reuse_layer, or "
                f"name layer {self.layer} in sources if layer {source} runs dense."
            )
        return shared.keep

    def _source(self) -> int | None:
        """The layer whose mask serves this one, None where there is none."""
        if self.sources is None:
            return self.layer // self.every * self.every
        return max((source for source in self.sources if source <= self.layer), default=None)

"""Bindings: the strategy and the state of one layer, kept on the model's attention modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from sparse_prefill.models.transformers.stats import Stats
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy, as_strategy

NAME = "sparse_prefill"  # the library's name in transformers' registries
BINDING = "_sparse_prefill"  # the attribute of attention modules that holds their binding
NO_GRAPH = "sparse_prefill selects blocks by the data, which can't be one graph: compile without fullgraph=True"

Choice = Strategy | Plan | str | Mapping[str, Any]


def as_choice(value: Choice) -> Strategy | Plan:
    """A strategy or a plan from the ways to name one.

    Raises:
        ValueError: if the value names none.
    """
    if isinstance(value, Plan):
        return value
    if isinstance(value, Mapping) and not value.keys() - {"default", "layers"}:
        return Plan(**value)
    return as_strategy(value)


@dataclass(eq=False)
class LayerBinding:
    """The strategy and the state of a layer. The layer's attention modules share one.

    Args:
        strategy (Strategy): which blocks to compute.
        index (int): index of the layer.
        register (Callable[[], object]): registers the library with transformers, for copies in another process.
        stats (Stats | None): where to gather calls. Default: nowhere.
        caches (dict[int, Any]): the cache of each forward in progress, by thread.
        states (WeakKeyDictionary): the CachedKeyState of each cache.
    """

    strategy: Strategy
    index: int
    register: Callable[[], object]
    stats: Stats | None = None
    caches: dict[int, Any] = field(default_factory=dict)
    states: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)

    def __getstate__(self) -> dict[str, Any]:
        """The fields that a copy of the model takes along, without caches and statistics."""
        return {"strategy": self.strategy, "index": self.index, "register": self.register}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
        if NAME not in AttentionInterface():  # another process may load the copy
            self.register()


def bind(module: nn.Module, binding: LayerBinding | None) -> None:
    """Put a binding on an attention module; None takes it off."""
    hooks = module._forward_pre_hooks
    own = [key for key, hook in hooks.items() if hook is _note_cache]
    if binding is None:
        module.__dict__.pop(BINDING, None)
        for key in own:
            del hooks[key], module._forward_pre_hooks_with_kwargs[key]
        return
    setattr(module, BINDING, binding)
    if not own:
        module.register_forward_pre_hook(_note_cache, with_kwargs=True)


def _note_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Note the cache before an attention module runs, since attention functions don't get it."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if isinstance(hidden, Tensor) and hidden.shape[1] > 1:
        _note(module, kwargs.get("past_key_values"))


@torch.compiler.disable(reason=NO_GRAPH)
def _note(module: nn.Module, cache: Any) -> None:
    if cast(Any, module).config._attn_implementation != NAME:  # the model has got another attention since
        bind(module, None)
    else:
        getattr(module, BINDING).caches[threading.get_ident()] = cache

"""Sparse prefill in any decoder of Hugging Face transformers, inside a ``with`` block.

transformers looks up two functions by the name that the model's config holds: an attention function for each layer,
and a mask function for each forward. Under this library's name, the mask function makes a
:class:`~sparse_prefill.Prompt` of the model's masking rule, or refuses, and the attention function attends through the
library. A single query runs SDPA with SDPA's own mask. The queries of one decoding step and the tokens that assisted
decoding guessed attend densely.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

from torch import nn
from transformers import AttentionInterface, PreTrainedConfig

from sparse_prefill.core.layer import Layer
from sparse_prefill.models.transformers.attention import register
from sparse_prefill.models.transformers.bindings import BINDING, NAME, Choice, LayerBinding, as_choice, bind
from sparse_prefill.models.transformers.layers import copied_configs, layer_modules, layer_type
from sparse_prefill.models.transformers.rotary import is_rotary, rope_of
from sparse_prefill.models.transformers.stats import Stats


@contextmanager
def sparse(model: nn.Module, strategy: Choice = "flex_prefill", *, stats: bool = True) -> Iterator[Stats]:
    """Give a model sparse prefill inside a ``with`` block.

    Prompts run through the strategy in any call of the model: ``generate``, pipelines, plain forwards. Decoding,
    speculative decoding included, stays dense. When the block ends, also by an exception, the model is as before: its
    weights, class and attention implementation. Blocks on one model may overlap; the last opened one counts. A copy
    made inside the block, by ``copy.deepcopy`` or ``torch.save``, stays sparse.

    Args:
        model (nn.Module): a decoder of transformers, or a module around one (compiled, with adapters).
        strategy (Strategy | Plan | str | Mapping): a strategy, its name, a mapping of its name and options, or a plan.
            Each layer gets what :meth:`~sparse_prefill.Strategy.for_layer` returns for it. Default: "flex_prefill".
        stats (bool): gather what each layer did. This waits for the device between the stages of a call, so set it to
            False to measure times. Default: True.

    Yields:
        Stats: what prefill did so far; empty without ``stats``.

    Raises:
        ValueError: if the strategy is unknown, the model has no attention layers, it doesn't use transformers'
            attention interface, or another thread has a block open on it. Inside the block, the model raises one if
            its mask combines anything but causality, sliding windows, chunks, padding at the ends and packed
            sequences, or if it asks for attention weights, dropout or gradients.

    Example:
        >>> with sparse(model, "flex_prefill") as stats:
        ...     model.generate(**tokens, max_new_tokens=64)
        >>> print(stats)
    """
    choice = as_choice(strategy)
    copies, texts = copied_configs(model)
    layers = layer_modules(model, texts)
    count = max(layers) + 1
    found = Stats() if stats else None
    rotaries = [module for module in model.modules() if is_rotary(module)]
    bindings: dict[nn.Module, LayerBinding] = {}
    for index, modules in layers.items():
        ropes = (rope_of(module, rotaries, layer_type(module, index)) for module in modules)
        layer = Layer(index, count, next(filter(None, ropes), None))
        binding = LayerBinding(choice.for_layer(layer), index, register, found)
        bindings |= dict.fromkeys(modules, binding)
    if NAME not in AttentionInterface():
        register()

    block = _Block(threading.get_ident())
    _open(block, model, copies, bindings)
    try:
        yield Stats() if found is None else found
    finally:
        _close(block)


# Blocks on one model may overlap and close in any order. Each module has a list of its settings in open blocks, of
# which the last one counts; the first one is the module's state before any block.


@dataclass(frozen=True, eq=False)
class _Block:
    thread: int


class _Setting(NamedTuple):
    """A module's config and binding in a block; without a block, those before the first one.

    The config is None if the module keeps its own.
    """

    block: _Block | None
    config: PreTrainedConfig | None
    binding: LayerBinding | None


_settings: WeakKeyDictionary[nn.Module, list[_Setting]] = WeakKeyDictionary()  # of modules in open blocks
_lock = threading.Lock()


def _open(
    block: _Block, model: nn.Module, copies: dict[int, PreTrainedConfig], bindings: dict[nn.Module, LayerBinding]
) -> None:
    modules = list(model.modules())
    with _lock:
        others = {setting.block for module in modules for setting in _settings.get(module, ())} - {None}
        if any(cast(_Block, other).thread != block.thread for other in others):
            raise ValueError(
                "Another thread has this model in a block of sparse: open one block around all threads, or give each "
                "thread its own copy of the model (copy.deepcopy)."
            )
        for module in modules:
            config = copies.get(id(getattr(module, "config", None)))
            if config is None and module not in bindings:
                continue
            former = None if config is None else cast(Any, module).config
            settings = _settings.setdefault(module, [_Setting(None, former, module.__dict__.get(BINDING))])
            settings.append(_Setting(block, config, bindings.get(module)))
            _apply(module, settings[-1])


def _close(block: _Block) -> None:
    with _lock:
        for module, settings in list(_settings.items()):
            if any(setting.block is block for setting in settings):
                settings[:] = [setting for setting in settings if setting.block is not block]
                _apply(module, settings[-1])
                if len(settings) == 1:
                    del _settings[module]


def _apply(module: nn.Module, setting: _Setting) -> None:
    if setting.config is not None:
        setattr(module, "config", setting.config)  # noqa: B010 (nn.Module declares no type for it)
    bind(module, setting.binding)

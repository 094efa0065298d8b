"""The door into Hugging Face transformers: any of its decoders with sparse prefill, through its own registry.

transformers asks an attention function for each layer and a mask function for each forward by the name that the
model's config holds. Under this library's name, the mask function makes a :class:`~sparse_prefill.Prompt` of what the
model would mask, or refuses, and the attention function attends through the library. A single query runs SDPA with
SDPA's own mask, as it would without the library. A few queries of one step of decoding, and the tokens that assisted
decoding guessed, attend to everything that they may.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from sparse_prefill.attention import sparse_attention
from sparse_prefill.core.key_state import KeyState
from sparse_prefill.core.layer import Layer
from sparse_prefill.core.logits import Logits, attend_rows
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.transformers.rotary import is_rotary, rope_of
from sparse_prefill.models.transformers.stats import Stats
from sparse_prefill.plan import Plan
from sparse_prefill.record import record, recorder
from sparse_prefill.strategy import Strategy, as_strategy

NAME = "sparse_prefill"
SERVED = "_sparse_prefill"  # attribute of attention modules
CHOICE = "sparse_prefill"  # attribute of a model's config
UNREADABLE = (
    "The model's own code reads the attention mask, of which sparse prefill makes no tensor (models whose own indexer "
    "selects tokens do so): run this model without sparse prefill."
)
NO_GRAPH = "sparse_prefill selects blocks by the data, which can't be one graph: compile without fullgraph=True"
# Arguments of attention functions that would change the answer, and that blocks of a causal prompt don't express.
UNKNOWN = ("position_bias", "cache", "indices", "block_indices", "sinks")
# Frames of a forward that verifies guessed tokens: assisted decoding, calling its model.
ASSISTED, CALL = GenerationMixin._assisted_decoding.__code__, nn.Module.__call__.__code__

Choice = Strategy | Plan | str | Mapping[str, Any]


# Switching a model ----------------------------------------------------------------------------------------


@contextmanager
def sparse(model: nn.Module, strategy: Choice = "flex_prefill", *, stats: bool = True) -> Iterator[Stats]:
    """Give a model sparse prefill inside a ``with`` block.

    Prompts run through the strategy, in any call of the model: ``generate``, pipelines, plain forwards. Decoding steps
    run as ever, those of speculative decoding included. On leaving, also by an exception, the model is what it was:
    its weights, class and attention implementation. Blocks on one model may overlap; of those that are open, the one
    that was opened last counts. A copy made inside the block, by ``copy.deepcopy`` or ``torch.save``, stays sparse.

    Args:
        model (nn.Module): a decoder of transformers, or a module around one (compiled, with adapters).
        strategy (Strategy | Plan | str | Mapping): a strategy, its name, a mapping of its name and options, or a plan.
            Each layer gets what :meth:`~sparse_prefill.Strategy.for_layer` returns for it. Default: "flex_prefill".
        stats (bool): gather what each layer did, which waits for the device between the stages of a call. A run that
            is timed should go without. Default: True.

    Yields:
        Stats: what prefill did so far; empty without ``stats``.

    Raises:
        ValueError: if the strategy is unknown, the model doesn't attend through transformers' attention interface, or
            another thread has a block open on it; inside the block, by the model, if its mask is none of causality,
            sliding windows, chunks, padding at the ends and packed sequences, or if it asks for attention weights,
            dropout or gradients.

    Example:
        >>> with sparse(model, "flex_prefill") as stats:
        ...     model.generate(**tokens, max_new_tokens=64)
        >>> print(stats)
    """
    choice = _as_choice(strategy)
    copies, texts = _copied_configs(model)
    layers = _layers(model, texts)
    count = max(layers) + 1
    found = Stats() if stats else None
    rotaries = [module for module in model.modules() if is_rotary(module)]
    served: dict[nn.Module, _LayerBinding] = {}
    for index, modules in layers.items():
        ropes = (rope_of(module, rotaries, _layer_type(module, index)) for module in modules)
        layer = Layer(index, count, next(filter(None, ropes), None))
        serving = _LayerBinding(choice.for_layer(layer), index, found)
        served |= dict.fromkeys(modules, serving)
    if NAME not in AttentionInterface():
        register()

    block = _Block(threading.get_ident())
    _open(block, model, copies, served)
    try:
        yield Stats() if found is None else found
    finally:
        _close(block)


def register(strategy: Choice = "flex_prefill") -> None:
    """Make ``attn_implementation="sparse_prefill"`` known to transformers.

    Models that are loaded under this name have sparse prefill from then on, with the strategy given here or, where
    the model's config has an attribute ``sparse_prefill`` (a name, or a mapping of a strategy or a plan), with that.
    A layer keeps the strategy that it first attended with. Such models gather no statistics, and their strategies
    aren't told the rotary embedding; :func:`sparse` does both.

    Args:
        strategy (Strategy | Plan | str | Mapping): as for :func:`sparse`. Default: "flex_prefill".

    Raises:
        ValueError: if the strategy is unknown.

    Example:
        >>> register("flex_prefill")
        >>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparse_prefill")
    """
    AttentionInterface.register(NAME, partial(_attention, default=_as_choice(strategy)))
    AttentionMaskInterface.register(NAME, _mask)


@dataclass(eq=False)
class _LayerBinding:
    """What an attention module needs in order to attend: one for each layer, on the model."""

    strategy: Strategy
    index: int
    stats: Stats | None = None
    caches: dict[int, Any] = field(default_factory=dict)  # of the forwards in progress, by thread
    states: WeakKeyDictionary = field(default_factory=WeakKeyDictionary)  # by cache

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the model takes along: neither caches nor the statistics of this one."""
        return {"strategy": self.strategy, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
        if NAME not in AttentionInterface():  # another process may have loaded the copy
            register()


def _as_choice(value: Choice) -> Strategy | Plan:
    if isinstance(value, Plan):
        return value
    if isinstance(value, Mapping) and not value.keys() - {"default", "layers"}:
        return Plan(**value)
    return as_strategy(value)


def _copied_configs(model: nn.Module) -> tuple[dict[int, PreTrainedConfig], set[int]]:
    """Copies of a model's configs, by the id of the original, and which of those are the decoder's.

    Copies, since models may share a config, and with it the name of the attention function.
    """
    roots = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not roots:
        raise ValueError(f"sparse takes a model of transformers, got {type(model).__name__}.")
    copies: dict[int, PreTrainedConfig] = {}

    def copied(config: PreTrainedConfig) -> PreTrainedConfig:
        if id(config) not in copies:
            copies[id(config)] = mine = copy.copy(config)
            for key in config.sub_configs:
                if isinstance(part := getattr(config, key, None), PreTrainedConfig):
                    mine.__dict__[key] = copied(part)
        return copies[id(config)]

    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            copied(config)
    kind = type(roots[0].config.get_text_config(decoder=True))
    texts = {key for key, config in copies.items() if type(config) is kind}
    for root in roots:
        if id(root.config) in texts and not root._can_set_attn_implementation():
            raise ValueError(
                f"{type(root).__name__} doesn't attend through transformers' attention interface, so that nothing can "
                "be put in its place: take a model of transformers itself, or call sparse_attention in its code."
            )
    for key in texts:
        copies[key]._attn_implementation_internal = NAME
    return copies, texts


def _layers(model: nn.Module, texts: set[int]) -> dict[int, list[nn.Module]]:
    """Modules that may attend, by the index of their layer."""
    layers: dict[int, list[nn.Module]] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and id(getattr(module, "config", None)) in texts:
            if index < 0:  # shared by several layers: the first of them has it
                index = next((int(part) for part in name.split(".") if part.isdigit()), 0)
            layers.setdefault(index, []).append(module)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention modules that know their layer_idx.")
    return layers


def _layer_type(attention: nn.Module, index: int) -> str | None:
    types = getattr(attention.config, "layer_types", None)
    return types[index] if types is not None and index < len(types) else None


# Blocks on one model may overlap and close in any order. Each module knows which are open, the last of which counts.


@dataclass(frozen=True, eq=False)
class _Block:
    thread: int


class _Place(NamedTuple):
    """What a module has in a block, or before the first of them: its config, None if it needs no other, and service."""

    block: _Block | None
    config: PreTrainedConfig | None
    served: _LayerBinding | None


_places: WeakKeyDictionary[nn.Module, list[_Place]] = WeakKeyDictionary()  # of modules in open blocks
_lock = threading.Lock()


def _open(
    block: _Block, model: nn.Module, copies: dict[int, PreTrainedConfig], served: dict[nn.Module, _LayerBinding]
) -> None:
    modules = list(model.modules())
    with _lock:
        others = {place.block for module in modules for place in _places.get(module, ())} - {None}
        if any(cast(_Block, other).thread != block.thread for other in others):
            raise ValueError(
                "Another thread has this model in a block of sparse: open one block around all threads, or give each "
                "thread a model of its own (a copy.deepcopy)."
            )
        for module in modules:
            config = copies.get(id(getattr(module, "config", None)))
            if config is None and module not in served:
                continue
            former = None if config is None else cast(Any, module).config
            places = _places.setdefault(module, [_Place(None, former, module.__dict__.get(SERVED))])
            places.append(_Place(block, config, served.get(module)))
            _put(module, places[-1])


def _close(block: _Block) -> None:
    with _lock:
        for module, places in list(_places.items()):
            if any(place.block is block for place in places):
                places[:] = [place for place in places if place.block is not block]
                _put(module, places[-1])
                if len(places) == 1:
                    del _places[module]


def _put(module: nn.Module, place: _Place) -> None:
    if place.config is not None:
        setattr(module, "config", place.config)  # noqa: B010 (a module's attributes have no type of their own)
    _serve(module, place.served)


def _serve(module: nn.Module, served: _LayerBinding | None) -> None:
    """Put what a module needs on it, or take it off."""
    hooks = module._forward_pre_hooks
    noting = [key for key, hook in hooks.items() if hook is _note_cache]
    if served is None:
        module.__dict__.pop(SERVED, None)
        for key in noting:
            del hooks[key], module._forward_pre_hooks_with_kwargs[key]
        return
    setattr(module, SERVED, served)
    if not noting:
        module.register_forward_pre_hook(_note_cache, with_kwargs=True)


def _note_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before an attention module runs: which cache it appends to, which attention functions aren't told."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if isinstance(hidden, Tensor) and hidden.shape[1] > 1:
        _note(module, kwargs.get("past_key_values"))


@torch.compiler.disable(reason=NO_GRAPH)
def _note(module: nn.Module, cache: Any) -> None:
    if cast(Any, module).config._attn_implementation != NAME:  # the model was given another attention since
        _serve(module, None)
    else:
        getattr(module, SERVED).caches[threading.get_ident()] = cache


# Masks ----------------------------------------------------------------------------------------------------


class _Unreadable(ValueError, AttributeError):
    """Both, since transformers asks masks whether they have an attribute."""


@dataclass(frozen=True, eq=False)
class _Mask:
    """What the mask function hands to the attention function, through the model.

    Args:
        prompt (Prompt | None): what the tokens are, without those that were guessed; None if it can't be said.
        slots (int): keys that the layer's cache hands out: those of the prompt, and a static cache's empty rest.
        guessed (Prompt | None): tokens behind the prompt that assisted decoding guessed, as the last of all.
        forgets (bool): whether the cache keeps the last tokens only. Default: False.
        refusal (str): why there is no prompt. A layer that attends with this mask raises it. Default: none.
    """

    prompt: Prompt | None
    slots: int
    guessed: Prompt | None = None
    forgets: bool = False
    refusal: str = ""
    ndim = 4  # transformers takes it for a mask that is ready

    def contiguous(self) -> _Mask:  # generate asks for that
        return self

    def __getitem__(self, item: Any) -> Any:
        raise _Unreadable(UNREADABLE)

    def __getattr__(self, name: str) -> Any:
        raise _Unreadable(UNREADABLE)

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        raise _Unreadable(UNREADABLE)


def _mask(*, attention_mask: Tensor | _Mask | None = None, **arguments: Any) -> _Mask | Tensor | None:
    """Called by transformers once per forward and kind of layer."""
    if isinstance(attention_mask, _Mask):  # generate has made it, for a static cache
        return attention_mask
    positions = arguments.get("cache_position")  # what early releases of transformers 5 give for the next two
    q_len = arguments["q_length"] if positions is None else len(positions)
    if q_len == 1:
        return sdpa_mask(attention_mask=attention_mask, **arguments)
    offset = arguments.get("q_offset", 0) if positions is None else positions[0]
    return _prompt_mask(
        q_len,
        arguments["kv_length"],
        offset,
        arguments.get("kv_offset", 0),
        arguments.get("mask_function", causal_mask_function),
        attention_mask,
        arguments.get("local_size"),
    )


@torch.compiler.disable(reason=NO_GRAPH)
def _prompt_mask(
    q_len: int,
    slots: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: Tensor | None,
    local_size: int | None,
) -> _Mask:
    first = int(q_offset)
    kv_len = first + q_len - kv_offset
    guessed = min(_guessed(), q_len - 1)
    rule, documents = _unpacked(mask_function)
    window, forgets = None, local_size is not None
    if local_size and _same(rule, sliding_window_causal_mask_function(local_size)):
        window = local_size
    elif local_size and (starts := _chunk_starts(rule, local_size)) is not None:
        documents = _chunk_numbers(starts, local_size, attention_mask, kv_offset, kv_len)
        attention_mask = None  # padding is in documents of its own
    elif not _same(rule, causal_mask_function):
        names = " and ".join(dict.fromkeys(_names(rule)))
        refusal = (
            f"the model masks attention by {names}{'' if local_size is None else f' of {local_size} tokens'}. Sparse "
            "prefill knows causal attention, sliding windows, chunks, padding and packed sequences: run this input "
            "without it."
        )
        return _Mask(None, slots, refusal=refusal)  # the model may have no layer that attends so
    left, right = _padding(attention_mask, kv_offset, kv_len)

    def last(count: int, before: int) -> Prompt:
        """``count`` tokens, all of the keys but the last ``before``."""
        end = kv_len - before
        parts = None if documents is None else documents[:, :end]
        of_rows = None if left is None else left.clamp(max=end)
        behind = None if right is None else (right - before).clamp(min=0)
        return Prompt(count, end, left_padding=of_rows, right_padding=behind, documents=parts, window=window)

    behind = last(guessed, 0) if guessed else None
    return _Mask(last(q_len - guessed, guessed), slots, behind, forgets)


def _guessed() -> int:
    """How many tokens at the end of this forward are guesses that assisted decoding has the model verify.

    The model isn't told. Of its callers, only assisted decoding itself knows.
    """
    frame, inner = sys._getframe(), None
    while frame is not None and frame.f_code is not ASSISTED:
        frame, inner = cast(Any, frame.f_back), frame
    # It may also be drafting, or changing the likelihoods, by a forward of its own.
    return frame.f_locals["candidate_length"] if frame is not None and cast(Any, inner).f_code is CALL else 0


def _chunk_starts(rule: Callable, size: int) -> Tensor | None:
    """Where the chunks of each row begin, if a mask function is that of chunks of this size."""
    parts = _captured(rule).get("mask_functions", ())
    starts = _captured(parts[0]).get("left_padding") if parts else None
    return starts if starts is not None and _same(rule, chunked_causal_mask_function(size, starts)) else None


def _chunk_numbers(starts: Tensor, size: int, attention_mask: Tensor | None, first: int, kv_len: int) -> Tensor:
    """The number of each token's chunk [B, kv_len]; padding is in chunks of its own."""
    positions = torch.arange(first, first + kv_len)
    numbers = (positions - starts.cpu()[:, None]).div(size, rounding_mode="floor")
    _, right = _padding(attention_mask, first, kv_len)
    if right is not None:
        behind = torch.arange(kv_len) >= (kv_len - right)[:, None]
        numbers = torch.where(behind, first + kv_len, numbers)
    return numbers


def _padding(attention_mask: Tensor | None, first: int, kv_len: int) -> tuple[Tensor | None, Tensor | None]:
    """Padding tokens in front of and behind each row of a mask [B, tokens], the keys being kv_len from ``first`` on."""
    if attention_mask is None:
        return None, None
    real = attention_mask[:, first : first + kv_len].bool().cpu()
    real = nn.functional.pad(real, (0, kv_len - real.shape[1]))  # as transformers does
    count = real.sum(1)
    left = torch.where(count > 0, real.int().argmax(1), kv_len)
    right = torch.where(count > 0, real.flip(1).int().argmax(1), 0)
    holes = (left + count + right != kv_len).nonzero().flatten().tolist()
    if holes:
        raise ValueError(
            f"attention_mask has holes in row {holes[0]}: sparse prefill takes padding in front of the tokens of a row "
            "and behind them. Remove the tokens in between, or run this input without sparse prefill."
        )
    return left, right


def _unpacked(mask_function: Callable) -> tuple[Callable, Tensor | None]:
    """A mask function without the rule that keeps packed sequences apart, and the number of each token's sequence."""
    parts = _captured(mask_function).get("mask_functions", ())
    none = torch.empty(0)
    apart = packed_sequence_mask_function(none)
    remapped = remap_positions_for_packed_sequence(causal_mask_function, none)
    if _code(mask_function) == _code(and_masks()) and list(map(_code, parts)) == [_code(apart), _code(remapped)]:
        return _captured(parts[1])["mask_function"], _captured(parts[0])["packed_sequence_mask"]
    return mask_function, None


def _same(a: Any, b: Any) -> bool:
    """Whether two mask functions are one rule: the same code that captures the same."""
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        return _code(a) == _code(b) and _same(tuple(_captured(a).values()), tuple(_captured(b).values()))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (isinstance(a, int) and isinstance(b, int) and a == b)


def _names(rule: Any) -> Iterator[str]:
    """What a mask function is made of, in transformers' names."""
    inner = [part for value in _captured(rule).values() for part in (value if isinstance(value, tuple) else (value,))]
    functions = [part for part in inner if isinstance(part, FunctionType)]
    if not functions:
        yield getattr(rule, "__qualname__", type(rule).__name__).partition(".")[0]
    for function in functions:
        yield from _names(function)


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


def _captured(function: Any) -> Mapping[str, Any]:
    return inspect.getclosurevars(function).nonlocals if isinstance(function, FunctionType) else {}


# Attention ------------------------------------------------------------------------------------------------


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Mask | Tensor | None,
    *,
    default: Strategy | Plan,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Called by transformers in each layer, with q [B, Hq, M, D] and what the cache holds; returns [B, M, Hq, D]."""
    if query.shape[2] > 1 or isinstance(attention_mask, _Mask):
        logits = Logits(scale=scaling, softcap=softcap or None, sinks=s_aux)
        return _prefill(module, query, key, value, attention_mask, logits, default, kwargs)
    _check_arguments(kwargs)
    if not softcap and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    logits = Logits(scale=scaling, softcap=softcap or None, sinks=s_aux)
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    if cast(Tensor, attention_mask).dtype != torch.bool:
        raise ValueError(f"A mask of a decoding step must be bool, got {cast(Tensor, attention_mask).dtype}.")
    return attend_rows(query, key, value, attention_mask, logits).transpose(1, 2), None


@torch.compiler.disable(reason=NO_GRAPH)
def _prefill(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: _Mask | Tensor | None,
    logits: Logits,
    default: Strategy | Plan,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    served: _LayerBinding = getattr(module, SERVED, None) or _bound(module, default)
    cache = served.caches.pop(threading.get_ident(), None)
    try:
        mask = _check(module, key, mask, kwargs)
        prompt = cast(Prompt, mask.prompt).on_grid(served.strategy.block_size)
        if mask.forgets:  # so that its blocks shift
            cache = None
        rows, keys = slice(0, prompt.q_len), slice(0, prompt.kv_len)
        out = _attended(served, query[:, :, rows], key[:, :, keys], value[:, :, keys], prompt, logits, cache)
        if mask.guessed is not None:
            rows, keys = slice(prompt.q_len, None), slice(0, mask.guessed.kv_len)
            guesses = _decoded(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask.guessed, logits)
            out = torch.cat([out, guesses], dim=2)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"In layer {served.index} ({served.strategy.label}): {error}") from error
    return out.transpose(1, 2).contiguous(), None


def _attended(
    served: _LayerBinding, q: Tensor, k: Tensor, v: Tensor, prompt: Prompt, logits: Logits, cache: Any
) -> Tensor:
    if served.strategy.dense_reason(prompt, q.device) == "decode":
        return _decoded(q, k, v, prompt, logits)
    state = _state(served, k, prompt, cache)
    options: dict[str, Any] = {"scale": logits.scale, "softcap": logits.softcap, "sinks": logits.sinks}
    with _recorded(served, q.shape[1]):
        return sparse_attention(q, k, v, served.strategy, prompt=prompt, state=state, **options)


def _decoded(q: Tensor, k: Tensor, v: Tensor, prompt: Prompt, logits: Logits) -> Tensor:
    """Some queries of decoding, which attend to all that they may. As single ones, they are in no statistics."""
    _, allowed = prompt.last_rows(prompt.q_len, q.device)  # of the last keys, [B or 1, 1, m, l]
    allowed = nn.functional.pad(allowed, (prompt.kv_len - allowed.shape[3], 0), value=True)
    return attend_rows(q, k, v, allowed, logits)


def _bound(module: nn.Module, default: Strategy | Plan) -> _LayerBinding:
    """What serves a module of a model that was loaded under this library's name, made when it first attends."""
    index, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(index, int) or not isinstance(count, int):
        raise ValueError(
            f"{type(module).__name__} attends under the name {NAME!r} without a layer_idx: it is no decoder's. Give "
            'the name to the text model alone, by attn_implementation={"text_config": "sparse_prefill"}.'
        )
    if index < 0:
        raise ValueError(
            f"{type(module).__name__} is shared by several layers and has layer_idx={index}: give this model sparse "
            "prefill by sparse(model, ...), which finds its place."
        )
    choice = _as_choice(getattr(config, CHOICE, default))
    served = _LayerBinding(choice.for_layer(Layer(index, count)), index)
    _serve(module, served)
    return served


def _check(module: nn.Module, key: Tensor, mask: _Mask | Tensor | None, kwargs: dict[str, Any]) -> _Mask:
    if not isinstance(mask, _Mask):
        given = "no mask" if mask is None else f"a mask of shape {list(mask.shape)}"
        raise ValueError(
            f"the model passes {given} where transformers' mask functions would make one: sparse prefill takes an "
            "attention_mask [batch, tokens] or none, and no cross-attention."
        )
    if mask.refusal:
        raise ValueError(mask.refusal)
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("this attention isn't causal: sparse prefill is. Run this model without it.")
    if key.shape[2] != mask.slots:
        raise ValueError(
            f"the layer attends to {key.shape[2]} keys, but the mask was made for {mask.slots}: sparse prefill needs "
            "caches whose layers of one type hold the same tokens."
        )
    if kwargs.get("dropout"):
        raise ValueError("attention dropout is on: call model.eval().")
    if kwargs.get("output_attentions"):
        raise ValueError("there are no attention weights to return: leave output_attentions off.")
    _check_arguments(kwargs)
    return mask


def _check_arguments(kwargs: dict[str, Any]) -> None:
    for name in UNKNOWN:
        if kwargs.get(name) is not None:
            raise ValueError(f"the model attends with {name}, which sparse prefill doesn't know.")


class _CachedKeyState(NamedTuple):
    """Key statistics of the chunks so far, how many tokens those are, and the last one's key [B, Hkv, D]."""

    state: KeyState
    tokens: int
    last: Tensor


def _state(served: _LayerBinding, key: Tensor, prompt: Prompt, cache: Any) -> KeyState | None:
    """What is remembered of a layer's keys: for the next chunk into the same cache, and for no other."""
    if cache is None:
        return None
    known: _CachedKeyState | None = served.states.get(cache)
    end = prompt.offset
    # A cache may have been cut, or have grown by decoding.
    continues = known is not None and known.tokens == end > 0 and torch.equal(known.last, key[:, :, end - 1])
    state = cast(_CachedKeyState, known).state if continues else KeyState()
    served.states[cache] = _CachedKeyState(state, prompt.kv_len, key[:, :, prompt.kv_len - 1].clone())
    return state


@contextmanager
def _recorded(served: _LayerBinding, heads: int) -> Iterator[None]:
    """Gather calls for the statistics, and pass them on to a recorder that is open around the model."""
    if served.stats is None:
        yield
        return
    outer = recorder()
    with record(None if outer is None else outer.inspect) as calls:
        yield
    served.stats.add(served.index, heads, calls)
    if outer is not None:
        outer.calls.extend(calls)

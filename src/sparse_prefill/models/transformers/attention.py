"""The attention function that transformers calls in each layer: prefill, guessed tokens, and decoding."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_prefill.attention import sparse_attention
from sparse_prefill.core.layer import Layer
from sparse_prefill.core.logits import Logits, attend_rows
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.transformers.bindings import BINDING, NAME, NO_GRAPH, Choice, LayerBinding, as_choice, bind
from sparse_prefill.models.transformers.checks import check_arguments, check_prompt_call
from sparse_prefill.models.transformers.key_states import continued_key_state
from sparse_prefill.models.transformers.masks import PromptMask, make_mask
from sparse_prefill.plan import Plan
from sparse_prefill.record import record, recorder
from sparse_prefill.strategy import Strategy

CHOICE = "sparse_prefill"  # the attribute of a model's config that names its strategy


def register(strategy: Choice = "flex_prefill") -> None:
    """Make ``attn_implementation="sparse_prefill"`` known to transformers.

    Models that are loaded under this name run sparse prefill from then on. They use the strategy of their config's
    attribute ``sparse_prefill`` (a name, or a mapping of a strategy or a plan), or else the one given here. A layer
    keeps the strategy of its first call. Such models gather no statistics, and their strategies don't get the rotary
    embedding; :func:`sparse` provides both.

    Args:
        strategy (Strategy | Plan | str | Mapping): as for :func:`sparse`. Default: "flex_prefill".

    Raises:
        ValueError: if the strategy is unknown.

    Example:
        >>> register("flex_prefill")
        >>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sparse_prefill")
    """
    AttentionInterface.register(NAME, partial(attend, default=as_choice(strategy)))
    AttentionMaskInterface.register(NAME, make_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PromptMask | Tensor | None,
    *,
    default: Strategy | Plan,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, in the form that transformers asks for.

    Args:
        module (nn.Module): the attention module.
        query (Tensor): [B, Hq, M, D].
        key (Tensor): all keys of the cache [B, Hkv, N, D].
        value (Tensor): all values of the cache [B, Hkv, N, D].
        attention_mask (PromptMask | Tensor | None): what :func:`~sparse_prefill.models.transformers.masks.make_mask`
            made.
        default (Strategy | Plan): for modules without a binding whose config names no strategy.
        scaling (float | None): scale of the logits.
        softcap (float | None): soft cap of the logits.
        s_aux (Tensor | None): attention sinks [Hq].
        **kwargs (Any): further arguments of the model, for checks and for SDPA.

    Returns:
        tuple[Tensor, None]: output [B, M, Hq, D], and no attention weights.

    Raises:
        ValueError: if the model asks for attention that sparse prefill doesn't support.
        RuntimeError: if a strategy fails; the message names the layer.
    """
    if query.shape[2] > 1 or isinstance(attention_mask, PromptMask):
        logits = Logits(scale=scaling, softcap=softcap or None, sinks=s_aux)
        return _prefill(module, query, key, value, attention_mask, logits, default, kwargs)
    check_arguments(kwargs)
    if not softcap and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    logits = Logits(scale=scaling, softcap=softcap or None, sinks=s_aux)
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    if cast(Tensor, attention_mask).dtype != torch.bool:
        raise ValueError(f"The mask of a decoding step must be bool, got {cast(Tensor, attention_mask).dtype}.")
    return attend_rows(query, key, value, attention_mask, logits).transpose(1, 2), None


@torch.compiler.disable(reason=NO_GRAPH)
def _prefill(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PromptMask | Tensor | None,
    logits: Logits,
    default: Strategy | Plan,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    binding: LayerBinding = getattr(module, BINDING, None) or bind_default(module, default)
    cache = binding.caches.pop(threading.get_ident(), None)
    try:
        mask = check_prompt_call(module, key, mask, kwargs)
        prompt = cast(Prompt, mask.prompt).on_grid(binding.strategy.block_size)
        if mask.is_sliding:  # its blocks shift, so their key state can't be continued
            cache = None
        rows, keys = slice(0, prompt.q_len), slice(0, prompt.kv_len)
        out = _attend_prompt(binding, query[:, :, rows], key[:, :, keys], value[:, :, keys], prompt, logits, cache)
        if mask.guessed is not None:
            rows, keys = slice(prompt.q_len, None), slice(0, mask.guessed.kv_len)
            guesses = _attend_densely(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask.guessed, logits)
            out = torch.cat([out, guesses], dim=2)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        raise kind(f"In layer {binding.index} ({binding.strategy.label}): {error}") from error
    return out.transpose(1, 2).contiguous(), None


def _attend_prompt(
    binding: LayerBinding, q: Tensor, k: Tensor, v: Tensor, prompt: Prompt, logits: Logits, cache: Any
) -> Tensor:
    if binding.strategy.dense_reason(prompt, q.device) == "decode":
        return _attend_densely(q, k, v, prompt, logits)
    state = continued_key_state(binding.states, k, prompt, cache)
    options: dict[str, Any] = {"scale": logits.scale, "softcap": logits.softcap, "sinks": logits.sinks}
    with _recorded(binding, q.shape[1]):
        return sparse_attention(q, k, v, binding.strategy, prompt=prompt, state=state, **options)


def _attend_densely(q: Tensor, k: Tensor, v: Tensor, prompt: Prompt, logits: Logits) -> Tensor:
    """Several queries of decoding, which attend to all visible keys. The statistics leave them out."""
    _, allowed = prompt.last_rows(prompt.q_len, q.device)  # of the last keys, [B or 1, 1, m, l]
    allowed = nn.functional.pad(allowed, (prompt.kv_len - allowed.shape[3], 0), value=True)
    return attend_rows(q, k, v, allowed, logits)


@contextmanager
def _recorded(binding: LayerBinding, heads: int) -> Iterator[None]:
    """Gather calls for the statistics, and pass them on to a recorder that is open around the model."""
    if binding.stats is None:
        yield
        return
    outer = recorder()
    with record(None if outer is None else outer.inspect) as calls:
        yield
    binding.stats.add(binding.index, heads, calls)
    if outer is not None:
        outer.calls.extend(calls)


def bind_default(module: nn.Module, default: Strategy | Plan) -> LayerBinding:
    """Bind a module of a model that was loaded under the library's name, at its first call.

    Raises:
        ValueError: if the module doesn't say which layer of a decoder it is.
    """
    index, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(index, int) or not isinstance(count, int):
        raise ValueError(
            f"{type(module).__name__} runs under attn_implementation={NAME!r} without a layer_idx. If it belongs to a "
            "decoder, use sparse(model, ...), which takes the index from the module's name. If it belongs to another "
            'part of the model, name the text model only: attn_implementation={"text_config": "sparse_prefill"}.'
        )
    if index < 0:
        raise ValueError(
            f"{type(module).__name__} is shared by several layers (layer_idx={index}): use sparse(model, ...), which "
            "takes the index from the module's name."
        )
    choice = as_choice(getattr(config, CHOICE, default))
    binding = LayerBinding(choice.for_layer(Layer(index, count)), index, register)
    bind(module, binding)
    return binding

"""Checks of what transformers passes to the attention function."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_prefill.models.transformers.masks import PromptMask

# Arguments of attention functions that change the result and that blocks of a causal prompt don't express.
UNSUPPORTED = ("position_bias", "cache", "indices", "block_indices", "sinks")


def check_prompt_call(
    module: nn.Module, key: Tensor, mask: PromptMask | Tensor | None, kwargs: dict[str, Any]
) -> PromptMask:
    """The mask of a call with a prompt; ValueError if the call asks for what sparse prefill doesn't do."""
    if not isinstance(mask, PromptMask):
        given = "no mask" if mask is None else f"a mask of shape {list(mask.shape)}"
        raise ValueError(
            f"the model passes {given}, not one that transformers' mask functions made: sparse prefill takes an "
            "attention_mask [batch, tokens] or none, and no cross-attention."
        )
    if mask.refusal:
        raise ValueError(mask.refusal)
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("this attention isn't causal, but sparse prefill is: run this model without it.")
    if key.shape[2] != mask.slots:
        raise ValueError(
            f"the layer attends to {key.shape[2]} keys, but the mask was made for {mask.slots}: sparse prefill needs "
            "caches whose layers of one type hold the same tokens."
        )
    if kwargs.get("dropout"):
        raise ValueError("attention dropout is on: call model.eval().")
    if kwargs.get("output_attentions"):
        raise ValueError("sparse prefill returns no attention weights: leave output_attentions off.")
    check_arguments(kwargs)
    return mask


def check_arguments(kwargs: dict[str, Any]) -> None:
    """Refuse arguments that would change the result."""
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"the model attends with {name}, which sparse prefill doesn't support: run this model without it."
            )

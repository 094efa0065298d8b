"""The mask function that transformers calls: from a model's masking rule to a :class:`~sparse_prefill.Prompt`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.models.transformers.bindings import NO_GRAPH
from sparse_prefill.models.transformers.mask_rules import chunk_starts, is_same_rule, rule_names, split_packing
from sparse_prefill.models.transformers.speculation import num_guessed_tokens

UNREADABLE = (
    "The model's own code reads the attention mask, but sparse prefill makes no mask tensor (models whose indexer "
    "selects tokens read it): run this model without sparse prefill."
)


class _UnreadableMaskError(ValueError, AttributeError):
    """Also an AttributeError, since transformers checks masks with ``hasattr``."""


@dataclass(frozen=True, eq=False)
class PromptMask:
    """The mask of a prompt. The model passes it on to the attention function; no other code can read it.

    Args:
        prompt (Prompt | None): the tokens without guessed ones; None if the model's mask is not supported.
        slots (int): keys that the layer's cache returns: those of the prompt and the empty rest of a static cache.
        guessed (Prompt | None): tokens guessed by assisted decoding, which follow the prompt. Default: none.
        is_sliding (bool): whether the cache keeps the last tokens only. Default: False.
        refusal (str): why there is no prompt; a layer that attends with this mask raises it. Default: none.
    """

    prompt: Prompt | None
    slots: int
    guessed: Prompt | None = None
    is_sliding: bool = False
    refusal: str = ""
    ndim = 4  # transformers leaves masks of four dimensions as they are

    def contiguous(self) -> PromptMask:
        """The mask itself; ``generate`` calls this."""
        return self

    def __getitem__(self, item: Any) -> Any:
        raise _UnreadableMaskError(UNREADABLE)

    def __getattr__(self, name: str) -> Any:
        raise _UnreadableMaskError(UNREADABLE)

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        raise _UnreadableMaskError(UNREADABLE)


def make_mask(*, attention_mask: Tensor | PromptMask | None = None, **arguments: Any) -> PromptMask | Tensor | None:
    """The mask of one kind of layer; transformers calls this once per forward and kind.

    Returns:
        PromptMask | Tensor | None: SDPA's own mask for a single query, else a PromptMask.

    Raises:
        ValueError: if ``attention_mask`` has holes.
    """
    if isinstance(attention_mask, PromptMask):  # made earlier by generate, for a static cache
        return attention_mask
    positions = arguments.get("cache_position")  # early releases of transformers 5 pass it for the next two
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
) -> PromptMask:
    first = int(q_offset)
    kv_len = first + q_len - kv_offset
    num_guessed = min(num_guessed_tokens(), q_len - 1)
    rule, documents = split_packing(mask_function)
    window, is_sliding = None, local_size is not None
    if local_size and is_same_rule(rule, sliding_window_causal_mask_function(local_size)):
        window = local_size
    elif local_size and (starts := chunk_starts(rule, local_size)) is not None:
        documents = _chunk_numbers(starts, local_size, attention_mask, kv_offset, kv_len)
        attention_mask = None  # padding is in separate documents
    elif not is_same_rule(rule, causal_mask_function):
        # Raised by a layer that attends so: the model may have none.
        return PromptMask(None, slots, refusal=_refusal(rule, local_size))
    left, right = _padding(attention_mask, kv_offset, kv_len)

    def last(count: int, after: int) -> Prompt:
        """The last ``count`` tokens before the final ``after`` ones."""
        end = kv_len - after
        parts = None if documents is None else documents[:, :end]
        left_padding = None if left is None else left.clamp(max=end)
        right_padding = None if right is None else (right - after).clamp(min=0)
        return Prompt(
            count, end, left_padding=left_padding, right_padding=right_padding, documents=parts, window=window
        )

    guessed = last(num_guessed, 0) if num_guessed else None
    return PromptMask(last(q_len - num_guessed, num_guessed), slots, guessed, is_sliding)


def _refusal(rule: Callable, local_size: int | None) -> str:
    names = " and ".join(dict.fromkeys(rule_names(rule)))
    return (
        f"the model masks attention by {names}{'' if local_size is None else f' of {local_size} tokens'}. Sparse "
        "prefill supports causal attention, sliding windows, chunks, padding and packed sequences: run this input "
        "without it."
    )


def _chunk_numbers(starts: Tensor, size: int, attention_mask: Tensor | None, first: int, kv_len: int) -> Tensor:
    """The number of each token's chunk [B, kv_len]. Padding is in separate chunks."""
    positions = torch.arange(first, first + kv_len)
    numbers = (positions - starts.cpu()[:, None]).div(size, rounding_mode="floor")
    _, right = _padding(attention_mask, first, kv_len)
    if right is not None:
        is_padding = torch.arange(kv_len) >= (kv_len - right)[:, None]
        numbers = torch.where(is_padding, first + kv_len, numbers)
    return numbers


def _padding(attention_mask: Tensor | None, first: int, kv_len: int) -> tuple[Tensor | None, Tensor | None]:
    """Padding tokens before and after the tokens of each row [B], for ``kv_len`` keys from position ``first`` on."""
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
            f"attention_mask has holes in row {holes[0]}: sparse prefill takes padding before and after the tokens of "
            "a row, not between them. Remove the masked tokens, or run this input without sparse prefill."
        )
    return left, right

"""Key statistics of a layer, carried from one prefill chunk to the next in the same cache."""

from __future__ import annotations

from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparse_prefill.core.key_state import KeyState
from sparse_prefill.core.prompt import Prompt


class CachedKeyState(NamedTuple):
    """Key statistics of the chunks so far, the number of their tokens, and the last token's key [B, Hkv, D]."""

    state: KeyState
    tokens: int
    last: Tensor


def continued_key_state(states: WeakKeyDictionary, key: Tensor, prompt: Prompt, cache: Any) -> KeyState | None:
    """The key state of this call: that of the chunk before it in the same cache, or a new one.

    Args:
        states (WeakKeyDictionary): the layer's CachedKeyState of each cache; updated.
        key (Tensor): all keys so far [B, Hkv, kv_len, D].
        prompt (Prompt): the chunk.
        cache (Any): the cache, None if the layer has none whose blocks stay in place.

    Returns:
        KeyState | None: the state; None without a cache.
    """
    if cache is None:
        return None
    known: CachedKeyState | None = states.get(cache)
    end = prompt.offset
    # A cache may have been cut, or have grown by decoding.
    continues = known is not None and known.tokens == end > 0 and torch.equal(known.last, key[:, :, end - 1])
    state = cast(CachedKeyState, known).state if continues else KeyState()
    states[cache] = CachedKeyState(state, prompt.kv_len, key[:, :, prompt.kv_len - 1].clone())
    return state

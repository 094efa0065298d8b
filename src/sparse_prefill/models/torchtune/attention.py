"""torchtune's attention classes, which attend through the library if the mask is a :class:`~sparse_prefill.Prompt`."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.phi3 import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import MultiHeadAttention, RotaryPositionalEmbeddings

from sparse_prefill.attention import sparse_attention
from sparse_prefill.core.key_state import KeyState
from sparse_prefill.core.layer import Layer, Rope, RopeLayout
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.strategy import Strategy

ROPE_LAYOUTS: dict[type, RopeLayout] = {
    RotaryPositionalEmbeddings: "interleaved",
    Llama3ScaledRoPE: "interleaved",
    Qwen2RotaryPositionalEmbeddings: "half_split",
    Phi3RotaryPositionalEmbeddings: "half_split",
}


class _PromptMask(torch.nn.Module):
    """Mixin for torchtune's attention classes: a :class:`~sparse_prefill.Prompt` as mask attends through the library.

    Parameters and their names are those of torchtune's class. Any other mask, a tensor or None, runs torchtune's dense
    attention.
    """

    # Attributes of torchtune's class
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attn_dropout: float
    q_proj: torch.nn.Module
    k_proj: torch.nn.Module
    v_proj: torch.nn.Module
    output_proj: torch.nn.Module
    pos_embeddings: torch.nn.Module | None
    q_norm: torch.nn.Module | None
    k_norm: torch.nn.Module
    kv_cache: Any
    cache_enabled: bool

    # Rules of the logits, and the sliding window in tokens; None for the defaults
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    def __init__(self, *, strategy: Strategy, layer: Layer | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.strategy, self.layer = strategy, layer

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Prompt | Tensor | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend to the tokens and those in the cache.

        Args:
            x (Tensor): input for the queries [b, s, d].
            y (Tensor | None): input for the keys and values; ``x`` itself if the mask is a Prompt.
            mask (Prompt | Tensor | None): a Prompt with ``q_len`` = s whose ``kv_len`` includes tokens in the cache,
                or one of torchtune's masks. Default: None.
            input_pos (Tensor | None): positions of the tokens [b or 1, s]. Default: 0, 1, ...

        Returns:
            Tensor: [b, s, d].

        Raises:
            ValueError: if the Prompt doesn't fit the tokens, the cache or the strategy, or if the attention has
                dropout and is in training mode. If the strategy raises an error, a note names the layer.

        Notation used for tensor shapes:
            b: batch size, s: tokens, n: tokens including those in the cache, n_h: query heads, n_kv: key heads,
            h_d: head dim, d: embedding dim.
        """
        if not isinstance(mask, Prompt):
            return super().forward(x, y, mask=mask, input_pos=input_pos)
        if y is None:
            raise ValueError("A Prompt as mask means causal self-attention: pass x as y too.")
        if self.training and self.attn_dropout > 0:
            raise ValueError("A Prompt as mask is for inference, and this attention has dropout: call model.eval().")

        b, s, _ = x.shape
        q = self.q_proj(x).view(b, s, self.num_heads, self.head_dim)
        k = self.k_proj(y).view(b, s, self.num_kv_heads, self.head_dim)
        v = self.v_proj(y).view(b, s, self.num_kv_heads, self.head_dim)
        if self.pos_embeddings is not None:
            q = self.pos_embeddings(q, input_pos=input_pos)
            k = self.pos_embeddings(k, input_pos=input_pos)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [b, n_h or n_kv, s, h_d]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        state = None
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self._cached(k, v, mask)  # [b, n_kv, n, h_d]
            state = self.kv_cache.key_state
        out = self._attend(q, k, v, mask, state)
        return self.output_proj(out.transpose(1, 2).reshape(b, s, -1))

    def reset_cache(self) -> None:
        """Empty the cache, and drop the key state that belongs to it."""
        super().reset_cache()  # type: ignore[misc]
        self.kv_cache.key_state = None

    def _cached(self, k: Tensor, v: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Append to the cache; return the keys and values of all tokens in it, without empty slots."""
        cache = self.kv_cache
        held = cache.size
        if held + k.shape[2] != prompt.kv_len:
            raise ValueError(
                f"The caches hold {held} tokens and {k.shape[2]} are added, but the Prompt has kv_len={prompt.kv_len}: "
                "call model.reset_caches() before a new prompt, or include the cached tokens in kv_len."
            )
        if prompt.kv_len > cache.k_cache.shape[2]:
            raise ValueError(
                f"The caches have {cache.k_cache.shape[2]} slots, but the Prompt has kv_len={prompt.kv_len}: "
                "set up larger ones."
            )
        # The cache carries the key state to later chunks; an empty cache starts a new one.
        state = getattr(cache, "key_state", None) if held else None
        cache.key_state = KeyState() if state is None else state
        copies = cache.k_cache.shape[1] // self.num_kv_heads  # Gemma 2's cache holds a copy for each query head
        if copies > 1:
            k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        k, v = cache.update(k.to(cache.k_cache.dtype), v.to(cache.v_cache.dtype))  # autocast makes them half precision
        return k[:, ::copies, : prompt.kv_len], v[:, ::copies, : prompt.kv_len]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, prompt: Prompt, state: KeyState | None) -> Tensor:
        prompt = prompt.on_grid(self.strategy.block_size)  # the strategy of this layer may have another block size
        if self.window is not None:
            prompt = _in_window(prompt, self.window)
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap, "state": state}
        try:
            return sparse_attention(q, k, v, self.strategy, prompt=prompt, **options)
        except Exception as error:
            if self.layer is not None:
                error.add_note(f"in layer {self.layer.index} of {self.layer.count}, counted from 0")
            raise


def _in_window(prompt: Prompt, window: int) -> Prompt:
    """The same tokens with a sliding window, cached on the prompt so that layers share its tables."""
    key = ("window", window)
    if key not in prompt.shared:
        prompt.shared[key] = replace(prompt, window=window)
    return prompt.shared[key]


class SparsePrefillAttention(_PromptMask, MultiHeadAttention):
    """torchtune's attention, which attends through the library if the mask is a :class:`~sparse_prefill.Prompt`.

    Parameters and their names are those of :class:`~torchtune.modules.MultiHeadAttention`. Any other mask, a tensor
    or None, runs torchtune's dense attention.

    Args:
        strategy (Strategy): which blocks to compute in this layer.
        layer (Layer | None): the layer that error notes name. Default: unknown.
        **kwargs (Any): see :class:`~torchtune.modules.MultiHeadAttention`.
    """


class SparsePrefillGemma2Attention(_PromptMask, Gemma2Attention):
    """The same for Gemma 2: soft-capped logits, and a sliding window in every other layer.

    Args:
        strategy (Strategy): which blocks to compute in this layer.
        layer (Layer | None): the layer that error notes name. Default: unknown.
        **kwargs (Any): those of Gemma 2's attention in torchtune.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        rules: Any = self
        self.scale, self.softcap, self.window = rules.scaling, rules.softcapping, rules.sliding_window_size


def rope_of(attn: MultiHeadAttention) -> Rope | None:
    """The rotary embedding of a layer; None if it has none, or one that isn't torchtune's."""
    embedding: Any = attn.pos_embeddings
    layout = ROPE_LAYOUTS.get(type(embedding))
    if layout is None:
        return None
    frequencies = getattr(embedding, "theta", None)
    if frequencies is None or frequencies.is_meta:  # the model has no weights yet
        embedding = copy.deepcopy(embedding)
        embedding.max_seq_len = 1
        with torch.device("cpu"):
            embedding.rope_init()
        frequencies = embedding.theta
    return Rope(layout, tuple(frequencies.tolist()))


# The class that replaces each attention class, and the attributes that it takes over.
SPARSE = {
    MultiHeadAttention: SparsePrefillAttention,
    SparsePrefillAttention: SparsePrefillAttention,
    Gemma2Attention: SparsePrefillGemma2Attention,
    SparsePrefillGemma2Attention: SparsePrefillGemma2Attention,
}
SAME = ["embed_dim", "num_heads", "num_kv_heads", "head_dim", "q_proj", "k_proj", "v_proj", "output_proj"]
SAME += ["pos_embeddings", "q_norm", "k_norm", "kv_cache", "max_seq_len", "is_causal", "attn_dropout"]
SAME_GEMMA2 = ["sliding_window_size", "softcapping"]


def to_sparse(attn: torch.nn.Module, strategy: Strategy, layer: Layer) -> torch.nn.Module:
    """A sparse attention module with the projections, parameters and caches of an attention in ``SPARSE``."""
    kind = SPARSE[type(attn)]
    names = SAME + SAME_GEMMA2 if kind is SparsePrefillGemma2Attention else SAME
    sparse: Any = kind(strategy=strategy, layer=layer, **{name: getattr(attn, name) for name in names})
    if kind is SparsePrefillGemma2Attention:
        sparse.scale = sparse.scaling = attn.scaling  # torchtune doesn't keep the argument that sets it
    sparse.cache_enabled = attn.cache_enabled
    sparse.training = attn.training
    return sparse

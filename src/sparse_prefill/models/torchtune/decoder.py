"""torchtune's decoder with sparse prefill in every layer.

A :class:`~sparse_prefill.Prompt` passed as torchtune's ``mask`` makes the layers attend through the library. Every
other mask works as it does in torchtune.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from sparse_prefill.core.layer import Layer
from sparse_prefill.models.torchtune.attention import SPARSE, rope_of, to_sparse
from sparse_prefill.plan import Plan
from sparse_prefill.strategy import Strategy, get_strategy


class LastTokenDecoder(TransformerDecoder):
    """torchtune's decoder, which computes logits of the last positions only.

    All logits of a prompt of 128K tokens with a vocabulary of 128K would take 94 GiB, and generation reads only the
    last row.

    Attributes:
        last (int): how many positions to keep. Default: 1.
        at (tuple[Tensor, Tensor] | None): batch rows and positions to keep instead, int64 [p] each. Default: None.
        hidden (bool): return normalised hidden states instead of logits. Default: False.
    """

    last: int = 1
    at: tuple[Tensor, Tensor] | None = None
    hidden: bool = False

    def unembed(self, h: Tensor) -> Tensor:
        """Hidden states [b, s, d] to fp32 logits [b, min(s, last), v] or [p, 1, v]."""
        h = h[:, max(h.shape[1] - self.last, 0) :] if self.at is None else h[self.at][:, None]
        return self.norm(h) if self.hidden else super().unembed(h)


def sparsify(model: TransformerDecoder, strategy: Strategy | Plan | str) -> LastTokenDecoder:
    """Give every layer of a decoder sparse prefill.

    This replaces each layer's attention in place and keeps the projections, so parameters, their names, adapters and
    caches stay. Use the returned decoder, which has the same layers: it computes the last position's logits only, and
    ``prefill``, ``generate`` and ``score`` need it. A model can be sparsified again with another strategy. torchtune's
    own ``generate`` passes tensors as masks, so it stays dense.

    Args:
        model (TransformerDecoder): a decoder of any builder whose layers are torchtune's self-attention layers.
        strategy (Strategy | Plan | str): a strategy, the name of one for its defaults, or a plan of several. Each
            layer gets what :meth:`~sparse_prefill.Strategy.for_layer` returns for it.

    Returns:
        LastTokenDecoder: the decoder.

    Raises:
        ValueError: if the strategy is unknown, the model isn't torchtune's plain decoder, or a layer's attention isn't
            supported (cross-attention, attention that isn't causal). The model is then unchanged.

    Example:
        >>> model = sparsify(llama3_2_1b(), get_strategy("flex_prefill", gamma=0.95))
    """
    if isinstance(strategy, str):
        strategy = get_strategy(strategy)
    if not isinstance(strategy, (Strategy, Plan)):
        raise ValueError(f"strategy must be a Strategy, the name of one or a Plan, got {type(strategy).__name__}.")
    if type(model) not in (TransformerDecoder, LastTokenDecoder):
        raise ValueError(f"sparsify takes a torchtune TransformerDecoder, got {type(model).__name__}.")
    for index, layer in enumerate(model.layers):
        _check_layer(index, layer)
    count = len(model.layers)
    places = [Layer(i, count, rope_of(layer.attn)) for i, layer in enumerate(model.layers)]
    strategies = [strategy.for_layer(place) for place in places]
    for layer, place, one in zip(model.layers, places, strategies, strict=True):
        layer.attn = to_sparse(layer.attn, one, place)
    decoder = LastTokenDecoder(
        tok_embeddings=model.tok_embeddings,
        layers=model.layers,
        max_seq_len=model.max_seq_len,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        norm=model.norm,
        output=model.output,
        output_hidden_states=model.output_hidden_states,
    )
    decoder.decoder_max_cache_seq_len = model.decoder_max_cache_seq_len
    decoder.training = model.training
    return decoder


def _check_layer(index: int, layer: torch.nn.Module) -> None:
    attn: Any = getattr(layer, "attn", None)
    if type(layer) is not TransformerSelfAttentionLayer:
        raise ValueError(
            f"Layer {index} is a {type(layer).__name__}; sparse prefill needs a TransformerSelfAttentionLayer."
        )
    if type(attn) not in SPARSE:
        raise ValueError(
            f"Layer {index} attends with {type(attn).__name__}, which sparse prefill doesn't support; it needs "
            "torchtune's MultiHeadAttention or Gemma2Attention."
        )
    if not attn.is_causal:
        raise ValueError(f"The attention of layer {index} isn't causal; sparse prefill needs causal attention.")

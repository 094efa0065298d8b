"""LServe: the static half of its prefill, retrieval heads and streaming heads of a wide window."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_prefill.registry import register_strategy
from sparse_prefill.strategies.duo_attention import DuoAttention


@register_strategy("lserve")
@dataclass(frozen=True, kw_only=True)
class LServe(DuoAttention):
    """LServe: retrieval heads read everything, streaming heads the first tokens and a wide window.

    Half of the heads stream, by the head table of ``duo_attention``, with a window of 8,192 tokens at any length. Their
    cost is linear in the length of long prompts. Nothing is estimated at run time.

    A prompt of up to ``sink`` + ``local`` tokens fits the window of every streaming head. It runs dense if
    ``retrieval`` is dense. Tables, layers, rounding to blocks and chunks are as in ``duo_attention``.

    Args:
        table (str | Sequence[Sequence[float]] | None): a number for each layer and key head, higher for heads that
            need more than a window: nested lists, or the path of a file of tab-separated numbers, as published, or of
            YAML. :meth:`for_layer` reads files. Default: None, which only works without a model.
        sparsity (float): share of the heads that stream; 1 or more for all, 0 for none. Of heads with equal numbers,
            the later ones stream. Default: 0.5.
        retrieval (Strategy | str | Mapping): strategy of the retrieval heads. Given by name, it takes over
            ``block_size``. The guards here don't apply to it. Default: "dense".
        streaming (Sequence[bool] | None): which key heads of the one layer stream, in place of a table; set by
            :meth:`for_layer`. Default: None.
        sink (int): first tokens that streaming heads keep. Default: 128.
        local (int): nearest keys that streaming heads keep. Default: 8192, as published.
        **guards: see :class:`~sparse_prefill.Strategy`; they are those of the streaming heads.

    Raises:
        ValueError: as for :class:`~sparse_prefill.strategies.duo_attention.DuoAttention`.
    """

    paper = "LServe, Yang et al. (arXiv 2502.14866)"
    reference = "mit-han-lab/omniserve@02b2925: prefill"
    use = """
Take it for prompts of 32K tokens or more, in models that have a table. **Up to 8,320 tokens it is dense**, and at 16K
it saves little: set `local`, or take `duo_attention`, whose window is 256 tokens. At a sparsity of 0.5 with
`retrieval="dense"`, half of the attention stays dense at any length.
"""
    differs = """
This is the static part of its prefill, with one difference: the released code masks the window token by token, and here
it is rounded out to blocks, so a little more is kept. Its quantised cache and its decoding, which selects pages of the
cache for the retrieval heads, aren't part of this package: decoding is dense.
"""
    crossover = 8192

    local: int = 8192

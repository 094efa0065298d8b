"""TriangleMix: another strategy in the lower layers, and a triangle in the upper ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.registry import register_strategy
from sparse_prefill.strategies.a_shape import AShape
from sparse_prefill.strategy import Strategy, as_strategy


@register_strategy("triangle_mix")
@dataclass(frozen=True, kw_only=True)
class TriangleMix(AShape):
    """TriangleMix: dense attention in the lower layers, and from layer ``start`` on a fixed triangle.

    The triangle keeps the first tokens, the nearest ones, and everything for the last queries of the prompt. According
    to the paper, upper layers lose little by it and lower layers much. The lower layers run ``below``, dense or any
    other strategy. The triangle is the same for every head and estimates nothing.

    Models bind the strategy to each layer by :meth:`for_layer`; unbound it is the triangle. Sizes are rounded out to
    whole blocks. A prompt in chunks of whole blocks selects the same blocks as in one piece if ``below`` does and each
    chunk knows the whole prompt's length, ``Prompt(total_len=...)``; otherwise the last rows of every chunk are dense.

    Args:
        start (int): first layer of the triangle, 0 or more. A model with at most so many layers runs ``below`` in all
        of
            them. Default: 16, as published for the 32 layers of Llama-3.1-8B.
        below (Strategy | str | Mapping): strategy of the layers before ``start``. Default: "dense".
        sink (int): first tokens that every query keeps. Default: 8.
        local (int): nearest keys that every query keeps. Default: 512.
        last (int): last query tokens that keep every key. Default: 128.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range or ``below`` is no strategy.
    """

    paper = "TriangleMix, 2025 (arXiv 2507.21526)"
    reference = "microsoft/MInference: minference/modules/tri_mix.py"
    use = (
        "Take it for models that answer at the end of long prompts, with dense attention or a careful method in the "
        "lower layers. Set `start` for models with another number of layers than 32. Don't take it for scores of text, "
        "perplexity or embeddings: in the upper layers, only the last rows see everything."
    )
    differs = (
        "Sizes are rounded out to blocks, so at least the released code's tokens are kept. Any strategy may run in the "
        "lower layers, and padding and chunks are served."
    )
    chunk_invariant = True
    head_independent = True
    crossover = 2048
    tunable = None  # layers differ already

    start: int = 16
    below: Strategy | str | Mapping[str, Any] = "dense"
    sink: int = 8
    local: int = 512
    last: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("start", self.start)
        object.__setattr__(self, "below", as_strategy(self.below))

    def for_layer(self, layer: Layer) -> Strategy:
        return self if layer.index >= self.start else as_strategy(self.below).for_layer(layer)

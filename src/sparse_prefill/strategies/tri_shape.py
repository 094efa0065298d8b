"""Sinks, a local window and the last rows dense."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_prefill.registry import register_strategy
from sparse_prefill.strategies.a_shape import AShape


@register_strategy("tri_shape")
@dataclass(frozen=True, kw_only=True)
class TriShape(AShape):
    """Keep the first tokens, the nearest ones, and everything for the last queries: the guards alone.

    The A-shape forgets what lies in the middle of a prompt. Here the last queries, as a rule the question itself, still
    read all of it. The table is the same for every head, looks at no tensor and costs nothing.

    What the last queries read was itself written without the middle. Sizes are rounded out to whole blocks. Prompts
    that are prefilled in chunks of whole blocks select what they select in one piece if each chunk is told the whole
    prompt's length, ``Prompt(total_len=...)``; else the last rows of every chunk are dense.

    Args:
        sink (int): first tokens that every query keeps. Default: 128.
        local (int): nearest keys that every query keeps. Published is 3,968, half of a prompt of 8K. Default: 1024.
        last (int): last query tokens that keep every key. Default: 100.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range.
    """

    paper = "Tri-shape, a preset of the MInference code (arXiv 2407.02490)"
    reference = "microsoft/MInference@fb56c91: attn_type tri_shape"
    use = (
        "Take it where the answer follows from one look of the question at the whole prompt: it costs no estimate and "
        "the last rows miss nothing. Don't take it to score text, for perplexity or for embeddings: all rows before "
        "the last ones are those of `a_shape`."
    )
    differs = (
        "Sizes are rounded out to blocks, so no less than the released code's tokens is kept. The window defaults to "
        "that of `a_shape`. The released code fails on prompts shorter than its last rows and takes no padding and no "
        "chunks."
    )
    chunk_invariant = True
    head_independent = True
    crossover = 2048

    last: int = 100

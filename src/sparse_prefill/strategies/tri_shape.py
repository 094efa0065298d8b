"""Attention sinks, a local window, and dense last rows."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_prefill.registry import register_strategy
from sparse_prefill.strategies.a_shape import AShape


@register_strategy("tri_shape")
@dataclass(frozen=True, kw_only=True)
class TriShape(AShape):
    """Keep the first tokens, the nearest ones, and everything for the last queries.

    The A-shape skips the middle of a prompt. Here the last queries, usually the question, still read all of it. But the
    keys and values that they read come from rows that skipped the middle. The strategy consists of guards: it is the
    same for every head and estimates nothing.

    Sizes are rounded out to whole blocks. A prompt in chunks of whole blocks selects the same blocks as in one piece if
    each chunk knows the whole prompt's length, ``Prompt(total_len=...)``; otherwise the last rows of every chunk are
    dense.

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
        "Take it if the question at the end only has to look up its answer in the prompt: the last rows miss nothing, "
        "and there is no estimate. Don't take it for scores of text, perplexity or embeddings: all rows before the "
        "last ones are those of `a_shape`."
    )
    differs = (
        "Sizes are rounded out to blocks, so at least the released code's tokens are kept. The window defaults to that "
        "of `a_shape`. The released code fails on prompts shorter than its last rows, and serves neither padding nor "
        "chunks."
    )
    chunk_invariant = True
    head_independent = True
    crossover = 2048

    last: int = 100

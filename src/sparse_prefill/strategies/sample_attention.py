"""SampleAttention: key blocks for all rows, by the true attention of a sample of the queries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.core.option_checks import check_fraction
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators import SampledMass, window_blocks
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors.cumulative import cumulative
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@register_strategy("sample_attention")
@dataclass(frozen=True, kw_only=True)
class SampleAttention(Strategy):
    """Keep a window, and the fewest key blocks that hold a share of a sample's attention beyond the window.

    Sampled queries, at even steps through the whole prompt, compute their full attention. C(j) is its sum over key
    block j, without the window that every query keeps anyway. Each head keeps the same key blocks in all rows: the
    fewest j with sum of C(j) of at least ``alpha`` times the sum over all j.

    C is exact: on average over a head, the sampled queries keep at least ``alpha`` of their attention. A key block that
    matters to a few other queries may be missed, and no diagonal beyond the window is kept. Each chunk of a prompt has
    its own sample, so chunks select other blocks than the prompt in one piece.

    Args:
        sample (float): share of the queries to sample, in (0, 1]: the last one and every ``round(1 / sample)``-th
            before it. The estimate takes about this share of the work of dense attention. Default: 0.05.
        alpha (float): share of the sampled attention beyond the window to keep, in (0, 1]. Default: 0.95.
        window (float): nearest keys that every query keeps, as a share of the prompt's real tokens, in (0, 1], rounded
            out to blocks. Default: 0.08.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range; from ``keep``, if the prompt has several documents.
    """

    paper = "SampleAttention, 2024 (arXiv 2406.15486)"
    use = """
Take it if recall matters more than density: it samples queries from the whole prompt, not only from its end, and keeps
as much as they need. All rows of a head keep the same key blocks, so heads whose rows look at different places keep
much, and heads of diffuse attention, as in the first layers, run nearly dense. The estimate costs several times as much
as one of block means.
"""
    differs = """
Written from a description of the method, and not compared with the released code. It keeps
whole key blocks, not single keys. `alpha` counts the attention beyond the window, in blocks, so the kept share of all
attention is higher. The defaults of `sample`, `alpha` and `window` are ours.
"""
    chunk_invariant = False
    head_independent = True
    crossover = 2048
    tunable = TunableOption("alpha", 0.01, 1.0)

    sample: float = 0.05
    alpha: float = 0.95
    window: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sample", "alpha", "window"):
            check_fraction(name, getattr(self, name))

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        check_one_document("sample_attention", "its columns are kept by all rows alike", prompt)
        return SampledMass(stride=round(1 / self.sample), window=self.window)(q, k, prompt)

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        return cumulative(scores, self.alpha) | window_blocks(self.window, prompt, scores.device)

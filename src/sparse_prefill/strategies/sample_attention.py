"""SampleAttention: the true attention of a sample of the queries tells which key blocks all of them need."""

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
    """A window, and the fewest key blocks that hold a share of what a sample of the queries attend beyond it.

    Queries at even steps through the whole prompt compute their full attention. What it puts on near keys is set
    aside, as every query keeps those. The rest is summed over the sample by key block, and each head keeps the same
    columns of blocks in all rows: the fewest that hold ``alpha`` of the sum.

    The masses are exact, those of the sampled queries: they keep at least ``alpha`` of their attention, on average over
    a head. A column that matters to a few other queries can be missed, and no diagonal beyond the window is followed. A
    prompt in chunks samples each chunk by itself, and so selects other blocks than in one piece.

    Args:
        sample (float): share of the queries to sample, in (0, 1]: the last one and every ``round(1 / sample)``-th
            before it. It is also about the estimator's share of the work of dense attention. Default: 0.05.
        alpha (float): share of the sampled attention beyond the window to keep, in (0, 1]. Default: 0.95.
        window (float): nearest keys that every query keeps, as a share of the prompt's real tokens, in (0, 1], rounded
            out to blocks. Default: 0.08.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range; from ``keep``, if the prompt is of several
            documents.
    """

    paper = "SampleAttention, 2024 (arXiv 2406.15486)"
    use = """
Where recall matters more than density: it asks queries from all over the prompt, not only from its end, and spends what
their attention needs. Columns serve all rows of a head, so heads whose rows look at different places cost much, and
those of spread attention, as in first layers, come out nearly dense. The estimator costs several times one of block
means.
"""
    differs = """
Written from a description of the method, and not compared with the released code. Columns are whole blocks, so that one
kernel serves them, not single keys. `alpha` counts the attention beyond the window, in blocks, so the kept share of all
attention is higher. `sample`, `alpha` and `window` are our defaults.
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

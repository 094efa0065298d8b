"""Key blocks by the true attention of the last queries: the simplest method that reads true attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparse_prefill.core.option_checks import check_fraction, check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators import RepresentativeMass
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import top_k
from sparse_prefill.selectors.cumulative import cumulative
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@register_strategy("last_query")
@dataclass(frozen=True, kw_only=True)
class LastQuery(Strategy):
    """Keep, in all rows of a head, the key blocks that hold the attention of the last queries.

    The last ``queries`` tokens, usually the question at the end of a prompt, compute their full attention. V(j) is its
    sum over key block j. Each head keeps the fewest key blocks with a sum of V(j) of at least ``share``, or as many of
    the largest as a ``budget`` allows. Each row also keeps its own block and the guards, but no window and no diagonal.

    V is exact, but only for the last queries. Each chunk of a prompt asks its own last queries, so chunks select other
    blocks than the prompt in one piece.

    Args:
        share (float): share of the last queries' attention to keep, in (0, 1]. Default: 0.9.
        queries (int): how many of the last queries, at least 1. Default: 64.
        budget (int | None): keep the highest key blocks, this many tokens rounded up to blocks, whatever share they
            hold. Default: none, ``share`` decides.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range; from ``keep``, if the prompt has several documents.
    """

    paper = "baseline of columns, as SnapKV picks the keys to cache (Li et al. 2024, arXiv 2404.14469)"
    use = """
A baseline that is strong if the question comes at the end of the prompt, and weak otherwise: rows that look at other
keys than the last queries lose them, above all their nearest keys. With `local` it is a usable method. `flex_prefill`
and `sample_attention` develop the same idea.
"""
    differs = """
It is not compared with the released code of SnapKV, which compresses the cache after a dense prefill, by pooled scores
of single keys. Here only its choice of columns is taken, in whole blocks, and for the prefill itself.
"""
    chunk_invariant = False
    head_independent = True
    crossover = 2048
    tunable = TunableOption("share", 0.01, 1.0)

    share: float = 0.9
    queries: int = 64
    budget: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("share", self.share)
        check_tokens("queries", self.queries, least=1)
        if self.budget is not None:
            check_tokens("budget", self.budget, least=1)

    def tunable_option(self) -> TunableOption | None:
        return self.tunable if self.budget is None else None  # a budget replaces the share

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        check_one_document("last_query", "its queries would all lie in the last one", prompt)
        return RepresentativeMass(queries=self.queries)(q, k, prompt).vertical[:, :, None]  # [B, Hq, 1, n_k]

    def select(self, scores: Tensor, prompt: Prompt) -> Tensor:
        if self.budget is None:
            return cumulative(scores, self.share)
        return top_k(scores, -(-self.budget // prompt.block_size))

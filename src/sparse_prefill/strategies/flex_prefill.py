"""FlexPrefill: each head picks a pattern and a budget for the prompt at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.fused import compile_on_gpu
from sparse_prefill.core.option_checks import check_fraction, check_nonnegative, check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators import (
    Representative,
    RepresentativeMass,
    by_diagonal,
    group_product,
    key_means,
    pooled_attention,
    query_means,
)
from sparse_prefill.estimators.pooled import softmax_among
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import CumulativeMass, top_k
from sparse_prefill.selectors.cumulative import cumulative
from sparse_prefill.strategies._flex_prefill_official import official_keep
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption

MAX_PAIRS_SORTED = 2**26  # pairs of blocks whose attention is sorted at once, unless one head has more


class _Scores(NamedTuple):
    representative: Representative
    query_aware: Tensor  # bool [B, Hq, 1]
    q_means: Tensor  # [B, Hq, n_q, D]
    k_means: Tensor  # [B, Hkv, n_k, D]


@register_strategy("flex_prefill")
@dataclass(frozen=True, kw_only=True)
class FlexPrefill(Strategy):
    """FlexPrefill: each head picks a pattern and a budget for the prompt at hand.

    The last ``block_size`` queries represent the prompt. Their true attention is summed by key block j into V(j)
    (*vertical*) and by block diagonal d into S(d) (*slash*). P(i, j) is attention between block means, and p(j) that
    of the mean of these queries:

    ```text
    query-aware head, if JS(p, V) < tau:   the fewest (i, j) of the whole map with sum of P >= gamma of its sum
    vertical-slash head, otherwise:        the fewest j with sum of V(j) >= gamma, and
                                           the fewest d with sum of S(d) >= gamma
    ```

    JS is the Jensen-Shannon distance: where it is small, block means predict the true attention well.

    By default whole blocks are counted, so that a vertical-slash head keeps at least ``gamma`` of the representative
    queries' attention at any block size, up to ``max_budget``. Other queries may keep less. With ``official=True`` the
    selection equals the released code block for block, and serves whole unpadded prompts only.

    Each chunk of a prompt has other last queries, so chunks select other blocks than the prompt in one piece. The host
    doesn't read back which heads are query-aware, so P is made and sorted for all heads: n_q x n_k in fp32 each, some
    heads at a time. With a ``tau`` of 0, P isn't made.

    Args:
        gamma (float): share of the attention to keep, in (0, 1]. The published settings, 0.9 and 0.95, count tokens;
            whole blocks keep more of the same share. Default: 0.8.
        tau (float): largest distance of a query-aware head, at most 0.83; 0 for none of them. Default: 0.1.
        min_budget (int | None): least tokens of the kept columns, and of the kept diagonals. It helps heads that reach
            ``gamma`` with only the first and the nearest blocks, and would keep nothing else. Default: 512, but no
            more than a sixteenth of the prompt; with ``official=True`` one block.
        max_budget (int | None): most tokens of either in vertical-slash heads; wins over ``gamma`` and ``min_budget``.
            Default: no limit.
        official (bool): select as the released code does. Default: False.
        **guards: see :class:`~sparse_prefill.Strategy`; ``sink`` is 1 token, i.e. the first block is always kept.

    Raises:
        ValueError: if an option is out of range; from ``keep``, if the prompt has several documents; at a call, if
            it is a chunk or padded with ``official=True``.
    """

    paper = "FlexPrefill, Lai et al., ICLR 2025 (arXiv 2502.20766)"
    reference = "ByteDance-Seed/FlexPrefill@a24b27b: flex_prefill/ops/flex_prefill_attention.py"
    use = """
The default for whole prompts. It estimates little, adapts to each head, and keeps little where little is needed. It
trusts the last block of queries, so it fits prompts whose end asks about the text before it. Take a strategy that
looks at every query block if chunks have to agree with the whole prompt, or if all positions matter, as in scoring a
text. `gamma` holds for the last queries; measure the others with [`evaluation.recall`](../api.md#measures).
"""
    differs = """
With `official=True` the selection equals the released code block for block, for comparison with published results. The
default mode differs in these points:

| | released code, `official=True` | default |
|---|---|---|
| budget of columns and diagonals | counts tokens that reach `gamma`, divided by 128 whatever the block size: blocks of 64 get half of the budget | counts blocks |
| share that is kept | not guaranteed: mass spread over ten blocks, a token in each, counts as ten tokens, i.e. one block | at least `gamma` of the last queries' attention by columns, and by diagonals, unless `max_budget` is less |
| block that crosses `gamma` in query-aware heads | dropped | kept |
| a diagonal | sums a block's width of distances in tokens, then keeps the block diagonal of that number, which holds about half of those token pairs | sums the block diagonal that it keeps |
| empty bins in the distance | NaN, which is not under `tau`: vertical-slash | count as 0 |
| `gamma=1` in query-aware heads | selects blocks in the future, too (dropped here) | selects what is visible |
| a `softmax_scale` of the caller | the estimator ignores it (ours scores with `scale` in both modes) | in the queries that are scored |
| dense | up to the larger of two blocks and `min_budget`, and under `min_length` | under `min_length` |
| chunks, prefixes, left padding | no (`ValueError`) | yes |
"""  # noqa: E501
    chunk_invariant = False
    head_independent = True
    tunable = TunableOption("gamma", 0.01, 1.0)
    crossover = 2048

    gamma: float = 0.8
    tau: float = 0.1
    min_budget: int | None = None
    max_budget: int | None = None
    official: bool = False
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("gamma", self.gamma)
        check_nonnegative("tau", self.tau)
        for name in ("min_budget", "max_budget"):
            if getattr(self, name) is not None:
                check_tokens(name, getattr(self, name), least=1)
        if not isinstance(self.official, bool):
            raise ValueError(f"official must be True or False, got {self.official!r}.")

    def tunable_option(self) -> TunableOption | None:
        return None if self.official else self.tunable  # the official mode decides while it scores

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> _Scores | Tensor:
        check_one_document("flex_prefill", "its representative queries would all lie in the last one", prompt)
        if self.official:
            if prompt.offset or not prompt.is_causal:
                raise ValueError(
                    "flex_prefill with official=True takes whole unpadded prompts, as the released code does: "
                    "drop official=True for chunks, prefixes and padding."
                )
            return official_keep(q, k, prompt, self.gamma, self.tau, *self._budgets(prompt))
        representative = RepresentativeMass()(q, k, prompt)
        k_means = key_means(k, prompt)
        query_aware = self._distance(representative, k_means, prompt) < self.tau
        return _Scores(representative, query_aware, query_means(q, prompt), k_means)

    def select(self, scores: _Scores | Tensor, prompt: Prompt) -> Tensor:
        if isinstance(scores, Tensor):
            return scores
        (vertical, slash, *_), query_aware, q_means, k_means = scores
        mass = torch.cat([vertical, slash], dim=1)  # sorted at once
        columns, diagonals = self._fewest(mass, torch.cat([query_aware, query_aware], dim=1), prompt).chunk(2, dim=1)
        keep = columns[:, :, None] | by_diagonal(diagonals, prompt)
        return keep | self._best(q_means, k_means, query_aware, prompt) if self.tau else keep

    def score_table(self, scores: _Scores | Tensor, prompt: Prompt) -> Tensor:
        if isinstance(scores, Tensor):
            return scores.float()
        (vertical, slash, *_), query_aware, q_means, k_means = scores
        table = torch.maximum(vertical[:, :, None], by_diagonal(slash, prompt))
        return torch.where(query_aware[..., None], pooled_attention(q_means, k_means, prompt), table)

    def _best(self, q_means: Tensor, k_means: Tensor, query_aware: Tensor, prompt: Prompt) -> Tensor:
        """The blocks of query-aware heads, none of the others: bool [B, Hq, n_q, n_k]."""
        batch, heads, n_q, _ = q_means.shape
        group = heads // k_means.shape[1]
        at_once = max(1, MAX_PAIRS_SORTED // (batch * n_q * prompt.n_k))  # whole key heads, or single query heads
        step = at_once // group * group or 1
        selector = CumulativeMass(share=self.gamma, scope="head")
        best = torch.empty(batch, heads, n_q, prompt.n_k, dtype=torch.bool, device=q_means.device)
        for first in range(0, heads, step):
            of = slice(first, first + step)
            keys = k_means[:, first // group : -(-(first + step) // group)]
            best[:, of] = selector(pooled_attention(q_means[:, of], keys, prompt), prompt)
        return best.logical_and_(query_aware[..., None])

    def _fewest(self, mass: Tensor, query_aware: Tensor, prompt: Prompt) -> Tensor:
        """The blocks or diagonals of most mass that the budget allows: bool [B, H, n_k]."""
        least, most = self._budgets(prompt)
        count = cumulative(mass, self.gamma).sum(-1, keepdim=True).clamp(min=least).clamp(max=most)
        return top_k(mass, torch.where(query_aware, least, count))

    def _budgets(self, prompt: Prompt) -> tuple[int, int]:
        tokens = self.min_budget
        if tokens is None:
            tokens = 1 if self.official else max(1, min(512, prompt.kv_len // 16))
        least = min(-(-tokens // prompt.block_size), prompt.n_k)
        most = prompt.n_k if self.max_budget is None else -(-self.max_budget // prompt.block_size)
        return least, min(most, prompt.n_k)

    def _distance(self, representative: Representative, k_means: Tensor, prompt: Prompt) -> Tensor:
        """Jensen-Shannon distance between the pooled and the true attention of the queries: fp32 [B, Hq, 1]."""
        true = representative.vertical
        real = prompt.real_keys(true.device).unflatten(1, (prompt.n_k, -1)).any(-1)  # [B, n_k]
        logits = group_product(representative.mean_query, k_means)[:, :, 0]
        pooled = softmax_among(logits, real[:, None], k_means.shape[-1] ** -0.5)
        return jensen_shannon_distance(pooled, true)


@compile_on_gpu
def jensen_shannon_distance(a: Tensor, b: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence, in [0, sqrt(ln 2)]: [..., n] and [..., n] to [..., 1]."""
    middle = (a + b) / 2
    # xlogy is 0 where a bin is empty, where the plain product would be NaN.
    divergence = torch.xlogy(a, a) + torch.xlogy(b, b) - 2 * torch.xlogy(middle, middle)
    return (divergence.sum(-1, keepdim=True) / 2).clamp(min=0).sqrt()

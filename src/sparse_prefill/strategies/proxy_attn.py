"""ProxyAttn: an averaged head ranks the blocks, and each head has its own budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.option_checks import check_fraction, check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators import ProxyHeads, RepresentativeMass
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors.cumulative import cumulative
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


class _Scores(NamedTuple):
    proxies: Tensor  # [B, groups, n_q, n_k]
    vertical: Tensor  # [B, Hq, n_k], attention of the last queries by key block


@register_strategy("proxy_attn")
@dataclass(frozen=True, kw_only=True)
class ProxyAttn(Strategy):
    """Rank blocks by the attention of an averaged head, and give each head its own budget.

    The heads of a layer look at similar tokens, but differ in how many they need. So the mean of the heads of a group
    ranks the blocks for all of them:

    ```text
    R(g, i, j) = max over block (i, j) of the attention of group g's mean head, between every stride-th query and key
    b(h)       = the fewest key blocks that hold gamma of the true attention of head h's last block_size queries
    keep, in each row i of head h in group g, the b(h) visible j of largest R(g, i, j)
    ```

    See :class:`~sparse_prefill.estimators.ProxyHeads`. Heads of a group with equal budgets keep the same blocks. Each
    chunk of a prompt sets budgets by its own last queries, so chunks select other blocks than the prompt in one piece.

    Args:
        gamma (float): share of the last queries' attention that sets a head's budget, in (0, 1]. Reported are 0.9 and
            0.95. Default: 0.9.
        groups (int): proxy heads, a number that divides the key heads. More of them cost more and separate heads that
            look at different places. Default: 1.
        stride (int): tokens from one query or key that is read to the next, 1, 2, 4, 8 or 16. Default: 4.
        min_budget (int | None): least tokens that each query block keeps, rounded up to blocks. Reported is 2048, which
            at 8K tokens is nearly half of the visible blocks. Default: 2048, but no more than a sixteenth of the
            prompt.
        **guards: see :class:`~sparse_prefill.Strategy`; ``sink`` is 1 token, i.e. the first block is always kept:
            averaged heads may miss the sink of single heads.

    Raises:
        ValueError: if an option is out of range; at a call, if ``groups`` doesn't divide the key heads; from ``keep``,
            if the prompt has several documents.
    """

    paper = "ProxyAttn: Guided Sparse Attention via Representative Heads, ICLR 2026 (arXiv 2509.24745)"
    use = (
        "Take it for models with many heads that look at the same places: the ranking costs the same for any number of "
        "heads in a group. Every query block of a head may keep as much as the last one needs, so the early rows of a "
        "prompt keep nearly all visible blocks. If the heads of a layer look at different places, raise `groups`, up "
        "to the number of key heads."
    )
    differs = (
        "Written from descriptions of the method, and not compared with the released code. The last `block_size` "
        "queries set the budgets; a ragged last query block may hold only a few of them. The least budget shrinks with "
        "prompts under 32K tokens, and the guard `sink` keeps the first block."
    )
    chunk_invariant = False
    crossover = 2048
    tunable = TunableOption("gamma", 0.01, 1.0, whole_layer=True)

    gamma: float = 0.9
    groups: int = 1
    stride: int = 4
    min_budget: int | None = None
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("gamma", self.gamma)
        ProxyHeads(groups=self.groups, stride=self.stride)
        if self.min_budget is not None:
            check_tokens("min_budget", self.min_budget, least=1)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> _Scores:
        check_one_document("proxy_attn", "the queries that set the budgets would all lie in the last one", prompt)
        proxies = ProxyHeads(groups=self.groups, stride=self.stride)(q, k, prompt)
        return _Scores(proxies, RepresentativeMass()(q, k, prompt).vertical)

    def select(self, scores: _Scores, prompt: Prompt) -> Tensor:
        proxies, vertical = scores
        ranked = proxies.masked_fill(~prompt.visible(proxies.device), -1).argsort(dim=-1, descending=True, stable=True)
        rank = ranked.argsort(dim=-1)  # 0 for the highest of a row; sorted once for all heads of a group
        budget = torch.maximum(
            cumulative(vertical, self.gamma).sum(-1), self._least(prompt, vertical.device)
        )  # [B, Hq]
        keep = rank[:, :, None] < budget.unflatten(1, (self.groups, -1))[..., None, None]  # [B, groups, heads, ...]
        return keep.flatten(1, 2)

    def score_table(self, scores: _Scores, prompt: Prompt) -> Tensor:
        heads = scores.vertical.shape[1] // self.groups
        return scores.proxies.repeat_interleave(heads, dim=1)

    def _least(self, prompt: Prompt, device: torch.device) -> Tensor:
        """Blocks that each query block keeps at least: int64 [B, 1]."""
        real = prompt.kv_len - prompt.start(device)[:, None]
        tokens = (real // 16).clamp(max=2048) if self.min_budget is None else torch.full_like(real, self.min_budget)
        return (tokens + prompt.block_size - 1) // prompt.block_size

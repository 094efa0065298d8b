"""A strategy: what looks important, how much of it to keep, and what is kept in any case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sparse_prefill import registry
from sparse_prefill.block_mask import check_keep, to_block_mask
from sparse_prefill.options import check_tokens
from sparse_prefill.prompt import Prompt, check_block_size
from sparse_prefill.record import stage
from sparse_prefill.validation import check_prompt, check_queries_and_keys

Estimator = Callable[[Tensor, Tensor, Prompt], Any]
Selector = Callable[[Any, Prompt], Tensor]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Base of all strategies: a method as a frozen dataclass of its options.

    A method says in :meth:`score` what looks important and in :meth:`select` what of it to keep. Neither applies
    causality nor forces a block: the guards below are applied once, after selection, to any method.

    Args:
        block_size (int): tokens in a block of queries and of keys, a power of two. Default: 128.
        min_length (int | None): prompts of fewer key tokens run dense in
            :func:`~sparse_prefill.sparse_attention`. Default: 16 blocks, about where sparse and dense break even
            (measured on a CPU with blocks of 128).
        sink (int): first tokens of the prompt whose key blocks every query keeps. Default: 0.
        local (int): keys nearer than this many tokens that every query keeps, rounded out to blocks. A query's
            own block is always kept. Default: 0.
        last (int): last query tokens that keep every key. Default: 0.

    Raises:
        ValueError: if an option is out of range.
    """

    name: ClassVar[str] = ""  # set by the registry
    paper: ClassVar[str] = ""  # where the method was published

    block_size: int = 128
    min_length: int | None = None
    sink: int = 0
    local: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if self.min_length is not None:
            check_tokens("min_length", self.min_length)
        for guard in ("sink", "local", "last"):
            check_tokens(guard, getattr(self, guard))

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Any:
        """What looks important.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): what the tokens are, M = ``prompt.q_len`` and N = ``prompt.kv_len``.

        Returns:
            Any: whatever :meth:`select` takes, as a rule fp32 scores [B, Hq, n_q, n_k], higher for more important.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define score(q, k, prompt).")

    def select(self, scores: Any, prompt: Prompt) -> Tensor:
        """What to keep: bool, broadcastable to [B, Hq, n_q, n_k]. Invisible blocks in it are dropped later."""
        raise NotImplementedError(f"{type(self).__name__} has to define select(scores, prompt).")

    def score_table(self, scores: Any, prompt: Prompt) -> Tensor:
        """The scores block by block, for pictures: fp32, broadcastable to [B, Hq, n_q, n_k]."""
        return scores

    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        """The blocks that this strategy computes.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt | None): what the tokens are. Default: one causal prompt of these lengths.

        Returns:
            Tensor: bool [B or 1, Hq or 1, n_q, n_k]. Never a block without a visible token pair, always every
            row's own block. ``min_length`` plays no part here.

        Raises:
            ValueError: if shapes, dtypes or devices don't fit each other or the prompt.
        """
        prompt = self.prompt_for(q, k, prompt)
        with stage("estimate", q.device):
            scores = self.score(q, k, prompt)
        with stage("select", q.device):
            keep = self._guarded(self.select(scores, prompt), q, prompt)
        return keep

    def block_mask(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> BlockMask:
        """:meth:`keep` as a ``BlockMask`` for a *compiled* ``flex_attention``.

        Eager ``flex_attention`` ignores block tables and would attend densely. Args and errors as for :meth:`keep`.
        """
        prompt = self.prompt_for(q, k, prompt)
        return to_block_mask(self.keep(q, k, prompt), prompt, batch=q.shape[0])

    def dense_reason(self, prompt: Prompt) -> str | None:
        """Why :func:`~sparse_prefill.sparse_attention` runs this prompt dense, or None where it runs sparse."""
        if prompt.q_len == 1:
            return "decode"
        least = 16 * self.block_size if self.min_length is None else self.min_length
        if prompt.kv_len < least:
            return "min_length"
        if prompt.n_k == 1:
            return "one block"
        return None

    def prompt_for(self, q: Tensor, k: Tensor, prompt: Prompt | None) -> Prompt:
        """The given prompt, checked against the tensors, or a plain causal one made for them."""
        check_queries_and_keys(q, k)
        if prompt is None:
            return Prompt(q_len=q.shape[2], kv_len=k.shape[2], block_size=self.block_size)
        check_prompt(prompt, q, k)
        if prompt.block_size != self.block_size:
            raise ValueError(
                f"The prompt has block_size={prompt.block_size} and the strategy block_size={self.block_size}: "
                "give both the same."
            )
        return prompt

    def _guarded(self, keep: Tensor, q: Tensor, prompt: Prompt) -> Tensor:
        check_keep(keep, q, prompt)
        device = q.device
        keep = keep | prompt.diagonal(device)
        if self.sink:
            keep = keep | prompt.first(self.sink, device)
        if self.local:
            keep = keep | prompt.near(self.local, device)
        if self.last:
            keep = keep | prompt.last(self.last, device)
        return keep & prompt.visible(device)


@dataclass(frozen=True, kw_only=True)
class ComposedStrategy(Strategy):
    """An estimator and a selector put together, for methods that need no class of their own.

    Args:
        estimator (Estimator): called as ``estimator(q, k, prompt)``.
        selector (Selector): called as ``selector(scores, prompt)``.
        **guards: see :class:`Strategy`.
    """

    estimator: Estimator
    selector: Selector

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Any:
        return self.estimator(q, k, prompt)

    def select(self, scores: Any, prompt: Prompt) -> Tensor:
        return self.selector(scores, prompt)


def get_strategy(name: str, **options: Any) -> Strategy:
    """Build a strategy by name.

    Args:
        name (str): one of :func:`list_strategies`.
        **options: fields of that strategy; see ``registry.strategies.options(name)``.

    Returns:
        Strategy: the strategy.

    Raises:
        ValueError: if the name or an option is unknown, or an option's value is out of range.

    Example:
        >>> get_strategy("a_shape", sink=128, local=1024).local
        1024
    """
    strategy = registry.strategies.build(name, options)
    if not isinstance(strategy, Strategy):
        raise ValueError(f"The strategy {name!r} was built as a {type(strategy).__name__}, not as a Strategy.")
    object.__setattr__(strategy, "name", name)  # functions may build strategies of a shared class
    return strategy


def list_strategies() -> list[str]:
    """Names of all strategies, sorted, those of installed third-party packages included."""
    return registry.strategies.names()


def get_estimator(name: str, **options: Any) -> Estimator:
    """Build an estimator by name; called as ``estimator(q, k, prompt)`` it returns scores. Errors as for strategies."""
    return registry.estimators.build(name, options)


def get_selector(name: str, **options: Any) -> Selector:
    """Build a selector by name; called as ``selector(scores, prompt)`` it returns bool. Errors as for strategies."""
    return registry.selectors.build(name, options)

"""A strategy: what looks important, how much of it to keep, and what is kept in any case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sparse_prefill import registry
from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt, check_block_size
from sparse_prefill.core.renamed import adopt_former_attributes
from sparse_prefill.core.tensor_checks import check_prompt, check_queries_and_keys
from sparse_prefill.kernel.block_lists import check_keep, to_block_mask
from sparse_prefill.kernel.block_sparse import block_sparse_attention
from sparse_prefill.kernel.dense import dense_attention
from sparse_prefill.kernel.segments import Segment
from sparse_prefill.record import stage
from sparse_prefill.tunable_option import TunableOption

FORMER_NAMES = {
    "knob": "tunable",
    "heads_apart": "head_independent",
    "numbers_heads": "indexes_heads",
    "spans_layers": "shares_across_layers",
}
Estimator = Callable[[Tensor, Tensor, Prompt], Any]
Selector = Callable[[Any, Prompt], Tensor]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Base of all strategies: a method as a frozen dataclass of its options.

    A method says in :meth:`score` what looks important and in :meth:`select` what of it to keep. Neither applies
    causality nor forces a block: the guards below are applied once, after selection, to any method.

    Args:
        block_size (int): tokens in a block of queries and of keys, a power of two. Default: 128.
        min_length (int | None): prompts of fewer tokens, those of a whole prompt that is told by
            ``Prompt(total_len=...)``, and sliding windows of fewer run dense in
            :func:`~sparse_prefill.sparse_attention`. Default: ``crossover``, or ``crossover_of_gpu``
            on a GPU, from which on the method was measured to be faster than dense attention; measure your own with
            ``benchmarks/crossover.py``.
        sink (int): first tokens of the prompt whose key blocks every query keeps. Default: 0.
        local (int): keys nearer than this many tokens that every query keeps, rounded out to blocks. A query's
            own block is always kept. Default: 0.
        last (int): last query tokens that keep every key. Default: 0.
        max_decode_queries (int): a call of at most so many queries after a cached prefix is decoding, such as the
            verification of speculated tokens, and runs dense. Chunks whose ``Prompt`` gives a ``total_len`` are prefill
            in any case. 0 leaves single queries only. Default: 32.

    Raises:
        ValueError: if an option is out of range.
    """

    name: ClassVar[str] = ""  # set by the registry
    paper: ClassVar[str] = ""  # where the method was published
    use: ClassVar[str] = ""  # when to take it, and when not: a Markdown paragraph for its page
    differs: ClassVar[str] = ""  # how it differs from the released code: Markdown for its page
    # Whether a prompt that is prefilled in chunks of whole blocks selects what it selects in one piece, the guard
    # ``last`` aside.
    chunk_invariant: ClassVar[bool] = False
    # Whether some key heads and their query heads by themselves, without the others, select what they select among all.
    head_independent: ClassVar[bool] = False
    # Tokens from which on the method, at its defaults, was measured to be faster than dense attention. This is where
    # the cheaper methods get there. On a GPU launches take as long as dense attention of some 16K tokens.
    crossover: ClassVar[int] = 2048
    crossover_of_gpu: ClassVar[int] = 32768
    tunable: ClassVar[TunableOption | None] = None  # the option that calibration sets, if there is one

    block_size: int = 128
    min_length: int | None = None
    sink: int = 0
    local: int = 0
    last: int = 0
    max_decode_queries: int = 32

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        adopt_former_attributes(cls, FORMER_NAMES)

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if self.min_length is not None:
            check_tokens("min_length", self.min_length)
        for count in ("sink", "local", "last", "max_decode_queries"):
            check_tokens(count, getattr(self, count))

    @property
    def label(self) -> str:
        """The name, or what else tells the strategy apart in records."""
        return self.name or type(self).__name__

    @property
    def indexes_heads(self) -> bool:
        """Whether its options speak of heads by number, so that it has to be shown all heads of a layer."""
        return False

    @property
    def shares_across_layers(self) -> bool:
        """Whether it leaves something with the prompt for other layers, or takes what they left."""
        return False

    def tunable_option(self) -> TunableOption | None:
        """The option that calibration sets: ``tunable``, or None where other options switch it off."""
        return self.tunable

    def for_layer(self, layer: Layer) -> Strategy:
        """The strategy that serves one layer of a model.

        Models ask for it once per layer. Methods whose pattern depends on the layer, or that need to know its rotary
        embedding, return another strategy here.

        Args:
            layer (Layer): the layer.

        Returns:
            Strategy: this one, unless the method says otherwise.
        """
        return self

    def for_heads(self, heads: slice, key_heads: slice) -> Strategy | None:
        """The strategy that selects for some heads of a layer, shown them alone, what this one selects among all.

        Args:
            heads (slice): the query heads, all those of ``key_heads``.
            key_heads (slice): the key heads.

        Returns:
            Strategy | None: this one if ``head_independent``, None if heads can't be told apart so.
        """
        return self if self.head_independent and not self.indexes_heads else None

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

    @own_precision
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
            ValueError: if shapes, dtypes or devices don't fit each other or the prompt, or the prompt has padding
                behind it: strategies look at the last queries, so select for its ``pieces()`` one by one.
        """
        prompt = self.prompt_for(q, k, prompt)
        if prompt.right_padding is not None:
            raise ValueError(
                "A strategy selects for prompts that end with their last token, and this one has right_padding: "
                "select for each of prompt.split_sequences(), as sparse_attention does."
            )
        with stage("estimate", q.device):
            scores = self.score(q, k, prompt)
        with stage("select", q.device):
            keep = self.guarded(self.select(scores, prompt), q, prompt)
        return keep

    def block_mask(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> BlockMask:
        """:meth:`keep` as a ``BlockMask`` for a *compiled* ``flex_attention``.

        Eager ``flex_attention`` ignores block tables and would attend densely. Args and errors as for :meth:`keep`.
        """
        prompt = self.prompt_for(q, k, prompt)
        return to_block_mask(self.keep(q, k, prompt), prompt, batch=q.shape[0])

    def attend(self, inputs: AttentionInputs, keep: Tensor, segments: Sequence[Segment] = ()) -> Tensor:
        """Attention over a table of :meth:`keep`: :func:`~sparse_prefill.block_sparse_attention`, unless corrected.

        Args:
            inputs (AttentionInputs): queries, keys, values, the prompt and how logits are made.
            keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k], within ``prompt.visible()``.
            segments (Sequence[Segment]): further keys and values that share the softmax. Default: none.

        Returns:
            Tensor: [B, Hq, M, Dv]; rows that keep nothing are 0.

        Raises:
            ValueError: if the tensors, the table, the segments and the prompt don't fit each other.
        """
        x = inputs
        return block_sparse_attention(x.q, x.k, x.v, keep, prompt=x.prompt, logits=x.logits, segments=segments)

    def attend_dense(self, inputs: AttentionInputs) -> Tensor:
        """Attention over everything, where :meth:`dense_reason` gives a reason: [B, Hq, M, Dv]."""
        return dense_attention(inputs.q, inputs.k, inputs.v, prompt=inputs.prompt, logits=inputs.logits)

    def dense_reason(self, prompt: Prompt, device: str | torch.device = "cpu") -> str | None:
        """Why :func:`~sparse_prefill.sparse_attention` runs this prompt dense, or None where it runs sparse.

        Args:
            prompt (Prompt): what the tokens are.
            device (str | torch.device): where they are; on a GPU other lengths pay. Default: "cpu".
        """
        # A prompt whose whole length is known is being prefilled, however short its chunks are.
        is_prefill = prompt.offset == 0 or prompt.total_len is not None
        if prompt.q_len == 1 or (prompt.q_len <= self.max_decode_queries and not is_prefill):
            return "decode"
        crossover = self.crossover_of_gpu if torch.device(device).type == "cuda" else self.crossover
        least = crossover if self.min_length is None else self.min_length
        # The first chunks of a long prompt run as they would within it.
        whole = prompt.kv_len if prompt.total_len is None else prompt.total_len
        if min(whole, prompt.window or whole) < least:
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

    def guarded(self, keep: Tensor, q: Tensor, prompt: Prompt) -> Tensor:
        """What :meth:`select` returned without invisible blocks and with the guards: bool, broadcast as ``keep``."""
        check_keep(keep, q, prompt)
        guards = prompt.guards(self.sink, self.local, self.last, q.device)
        return (keep & prompt.visible(q.device)) | guards


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
    """Build a strategy by name, or wrap one.

    Args:
        name (str): one of :func:`list_strategies` or :func:`list_wrappers`.
        **options: fields of that strategy; see ``registry.strategies.options(name)``. What a wrapper takes as a
            strategy may be a strategy, its name, or a mapping of its name and options.

    Returns:
        Strategy: the strategy.

    Raises:
        ValueError: if the name or an option is unknown, or an option's value is out of range.

    Example:
        >>> get_strategy("a_shape", sink=128, local=1024).local
        1024
        >>> get_strategy("delta", of={"name": "a_shape", "sink": 128}).label
        'delta(a_shape)'
    """
    kind = registry.strategies
    if name not in kind:
        if name not in registry.wrappers:
            raise ValueError(
                f"Unknown strategy {name!r}. There are: {', '.join(list_strategies())}; and to wrap one: "
                f"{', '.join(list_wrappers())}."
            )
        kind = registry.wrappers
    strategy = kind.build(name, options)
    if not isinstance(strategy, Strategy):
        raise ValueError(f"The strategy {name!r} was built as a {type(strategy).__name__}, not as a Strategy.")
    object.__setattr__(strategy, "name", name)  # functions may build strategies of a shared class
    return strategy


def as_strategy(value: Strategy | str | Mapping[str, Any]) -> Strategy:
    """A strategy, its name, or a mapping of its ``name`` and options, as a strategy; else ValueError."""
    if isinstance(value, Strategy):
        return value
    if isinstance(value, str):
        return get_strategy(value)
    if isinstance(value, Mapping) and isinstance(value.get("name"), str) and all(isinstance(key, str) for key in value):
        return get_strategy(**value)
    raise ValueError(f"A strategy must be a Strategy, a name, or a mapping with a name and options, got {value!r}.")


def to_config(strategy: Strategy) -> dict[str, Any]:
    """The name and the options of a strategy as plain numbers, strings, lists and dicts; :func:`as_strategy` undoes it.

    Raises:
        ValueError: if the strategy is none of a registered class, or an option can't be written.
    """
    kinds = (registry.strategies, registry.wrappers)
    if not any(strategy.name in kind and kind.factory(strategy.name) is type(strategy) for kind in kinds):
        raise ValueError(
            f"{strategy!r} can't be written: register its class with register_strategy, so that its name builds it."
        )
    options = {f.name: getattr(strategy, f.name) for f in fields(strategy) if f.init}
    return {"name": strategy.name, **{name: _plain(name, value) for name, value in options.items()}}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Strategy):
        return to_config(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(name, one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(name, one) for one in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"The option {name} can't be written: it is a {type(value).__name__}.")


def list_strategies() -> list[str]:
    """Names of all strategies, sorted, those of installed third-party packages included."""
    return registry.strategies.names()


def list_wrappers() -> list[str]:
    """Names of all wrappers of strategies, sorted; :func:`get_strategy` builds them, too."""
    return registry.wrappers.names()


def get_estimator(name: str, **options: Any) -> Estimator:
    """Build an estimator by name; called as ``estimator(q, k, prompt)`` it returns scores. Errors as for strategies."""
    return registry.estimators.build(name, options)


def get_selector(name: str, **options: Any) -> Selector:
    """Build a selector by name; called as ``selector(scores, prompt)`` it returns bool. Errors as for strategies."""
    return registry.selectors.build(name, options)

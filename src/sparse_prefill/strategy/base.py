"""A strategy: which blocks score high, how many of them to keep, and which blocks are always kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.copies import copy_with
from sparse_prefill.core.inputs import AttentionInputs
from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_block_size, check_tokens
from sparse_prefill.core.prompt import Prompt
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


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Base of all strategies: a method as a frozen dataclass of its options.

    A method scores blocks in :meth:`score` and chooses blocks by their scores in :meth:`select`. Neither applies
    causality or forces a block: the guards below are applied after selection, in the same way for all methods.

    Args:
        block_size (int): tokens in a block of queries and of keys, a power of two. Default: 128.
        min_length (int | None): shorter prompts and shorter sliding windows run dense in
            :func:`~sparse_prefill.sparse_attention`. A chunk counts as its whole prompt if ``Prompt(total_len=...)``
            gives that. Default: ``crossover``, or ``crossover_of_gpu`` on a GPU: the length from which the method was
            measured to be faster than dense attention. ``benchmarks/crossover.py`` measures it on your machine.
        sink (int): every query keeps the key blocks of this many first tokens of the prompt. Default: 0.
        local (int): every query keeps the key blocks of this many nearest tokens. It always keeps its own block.
            Default: 0.
        last (int): this many last query tokens keep all keys. Default: 0.
        max_decode_queries (int): a call of at most this many queries after a cached prefix is decoding, such as the
            verification of speculated tokens, and runs dense. Chunks whose ``Prompt`` gives a ``total_len`` are always
            prefill. With 0, only single queries are decoding. Default: 32.

    Raises:
        ValueError: if an option is out of range.
    """

    name: ClassVar[str] = ""  # set by the registry
    paper: ClassVar[str] = ""  # where the method was published
    reference: ClassVar[str] = ""  # released code that it was compared with: "owner/repo@commit: path; ..."
    use: ClassVar[str] = ""  # when to use it, and when not: a Markdown paragraph for its page
    differs: ClassVar[str] = ""  # how it differs from the released code: Markdown for its page
    # True if a prompt in chunks of whole blocks selects the same blocks as in one piece, except for the guard ``last``.
    chunk_invariant: ClassVar[bool] = False
    # True if the selection for a group of key heads and their query heads doesn't depend on the other heads.
    head_independent: ClassVar[bool] = False
    # Prompt length in tokens from which the method with its defaults was measured to be faster than dense attention.
    # These are the lengths for the cheaper methods. On a GPU, kernel launches take as long as dense attention at 16K.
    crossover: ClassVar[int] = 2048
    crossover_of_gpu: ClassVar[int] = 32768
    tunable: ClassVar[TunableOption | None] = None  # the option that calibration sets

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
        """The name of the strategy in records: its registered name, or else its class."""
        return self.name or type(self).__name__

    @property
    def indexes_heads(self) -> bool:
        """Whether its options refer to heads by index, so that it needs all heads of a layer in one call."""
        return False

    @property
    def shares_across_layers(self) -> bool:
        """Whether its layers share something through the prompt's cache, such as a keep table."""
        return False

    def with_fields(self, **values: Any) -> Self:
        """This strategy with other values of some fields.

        Unlike ``dataclasses.replace``, it keeps the name of a strategy that a registered function built.
        """
        return replace(self, **values).named(self.name)

    def named(self, name: str) -> Self:
        """This strategy under the name that it was built by."""
        return self if self.name == name else copy_with(self, name=name)

    def tunable_option(self) -> TunableOption | None:
        """The option that calibration sets: ``tunable``, or None if other options disable it."""
        return self.tunable

    def for_layer(self, layer: Layer) -> Strategy:
        """The strategy for one layer of a model.

        Models call it once per layer. Methods whose pattern depends on the layer, or on its rotary embedding, return
        another strategy.

        Args:
            layer (Layer): the layer.

        Returns:
            Strategy: this one, unless the method overrides it.
        """
        return self

    def for_heads(self, heads: slice, key_heads: slice) -> Strategy | None:
        """The strategy that selects for some heads of a layer the same blocks as this one does for all heads.

        Args:
            heads (slice): the query heads, all those of ``key_heads``.
            key_heads (slice): the key heads.

        Returns:
            Strategy | None: this one if ``head_independent``, None if the heads can't be separated.
        """
        return self if self.head_independent and not self.indexes_heads else None

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Any:
        """How important the blocks are.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): what the tokens are, M = ``prompt.q_len`` and N = ``prompt.kv_len``.

        Returns:
            Any: what :meth:`select` takes, usually fp32 scores [B, Hq, n_q, n_k], higher for more important blocks.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define score(q, k, prompt).")

    def select(self, scores: Any, prompt: Prompt) -> Tensor:
        """The blocks to keep: bool, broadcastable to [B, Hq, n_q, n_k]. Invisible ones are dropped later."""
        raise NotImplementedError(f"{type(self).__name__} has to define select(scores, prompt).")

    def score_table(self, scores: Any, prompt: Prompt) -> Tensor:
        """The scores of single blocks, for pictures: fp32, broadcastable to [B, Hq, n_q, n_k]."""
        return scores

    @own_precision
    def keep(self, q: Tensor, k: Tensor, prompt: Prompt | None = None) -> Tensor:
        """The blocks that this strategy computes.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt | None): what the tokens are. Default: one causal prompt of these lengths.

        Returns:
            Tensor: bool [B or 1, Hq or 1, n_q, n_k]. It never has a block without a visible token pair, and always has
            each row's own block. ``min_length`` isn't applied.

        Raises:
            ValueError: if shapes, dtypes or devices don't fit each other or the prompt, or the prompt has right
                padding: strategies look at the last queries, so select for each of ``prompt.split_sequences()``.
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

        Eager ``flex_attention`` ignores block tables and would attend densely. Args and errors are those of
        :meth:`keep`.
        """
        prompt = self.prompt_for(q, k, prompt)
        return to_block_mask(self.keep(q, k, prompt), prompt, batch=q.shape[0])

    def attend(self, inputs: AttentionInputs, keep: Tensor, segments: Sequence[Segment] = ()) -> Tensor:
        """Attention over a table of :meth:`keep`, by :func:`~sparse_prefill.block_sparse_attention`.

        Wrappers that correct the output override it.

        Args:
            inputs (AttentionInputs): queries, keys, values, the prompt and the options of logits.
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
        """Attention over all visible tokens, for calls with a :meth:`dense_reason`: [B, Hq, M, Dv]."""
        return dense_attention(inputs.q, inputs.k, inputs.v, prompt=inputs.prompt, logits=inputs.logits)

    def dense_reason(self, prompt: Prompt, device: str | torch.device = "cpu") -> str | None:
        """Why :func:`~sparse_prefill.sparse_attention` runs this prompt dense, or None if it runs sparse.

        Args:
            prompt (Prompt): what the tokens are.
            device (str | torch.device): where they are, since the default ``min_length`` depends on it. Default: "cpu".
        """
        # A prompt whose whole length is known is being prefilled, even in short chunks.
        is_prefill = prompt.offset == 0 or prompt.total_len is not None
        if prompt.q_len == 1 or (prompt.q_len <= self.max_decode_queries and not is_prefill):
            return "decode"
        crossover = self.crossover_of_gpu if torch.device(device).type == "cuda" else self.crossover
        least = crossover if self.min_length is None else self.min_length
        # The first chunks of a long prompt run as they do in the whole prompt.
        if min(prompt.whole_len, prompt.window or prompt.whole_len) < least:
            return "min_length"
        if prompt.n_k == 1:
            return "one block"
        return None

    def prompt_for(self, q: Tensor, k: Tensor, prompt: Prompt | None) -> Prompt:
        """The given prompt after a check against the tensors, or a causal prompt of their lengths if None is given."""
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
        """The table of :meth:`select` without invisible blocks and with the guards: bool, broadcast as ``keep``."""
        check_keep(keep, q, prompt)
        guards = prompt.guards(self.sink, self.local, self.last, q.device)
        return (keep & prompt.visible(q.device)) | guards

"""MInference: a fixed pattern for each head, filled in for the prompt at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_prefill.core.constants import constants
from sparse_prefill.core.layer import Layer
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.prompt_cache import CacheKey
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators import (
    Representative,
    RepresentativeMass,
    by_diagonal,
    key_means,
    pooled_attention,
    query_means,
)
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import top_k
from sparse_prefill.strategies._head_patterns import (
    TYPES,
    HeadPattern,
    check_patterns,
    check_type,
    load_patterns,
    save_patterns,
)
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption

__all__ = ["HeadPattern", "MInference", "load_patterns", "save_patterns"]

UNLISTED = ("vertical_and_slash", 1000, 6096)  # the pattern of heads that published files leave out
# Default sizes in tokens: those of the A-shape, and the most of the others, which are a share of the prompt.
A_SHAPE = (100, 800)
MOST = {"vertical_and_slash": (1000, 6096), "block_sparse": (6400,)}
SHARE = 8  # the default share is an eighth of the prompt
UNIT = 64  # tokens in the blocks that sizes of "block_sparse" count


class _Scores(NamedTuple):
    heads: int  # how many query heads there are
    device: torch.device
    representative: Representative | None  # None where no head is vertical-slash
    pooled: Tensor | None  # [B, Hq, n_q, n_k], None where no head is block-sparse


@register_strategy("minference")
@dataclass(frozen=True, kw_only=True)
class MInference(Strategy):
    """MInference: each head has a pattern that was searched beforehand, and its blocks are found for each prompt.

    ``config`` reads the published files, which give each head of each layer one of three patterns. Without a file, all
    heads have the pattern of ``pattern``, ``vertical`` and ``slash``. With V(j) and S(d) the true attention of the last
    ``last_q`` queries, summed by key block j and by block diagonal d, and P attention between block means:

    ```text
    vertical_and_slash    the ceil(vertical / block_size) key blocks of largest V(j), and
                          the ceil(slash / block_size) block diagonals of largest S(d)
    block_sparse          in each query block i, the ceil(64 vertical / block_size) key blocks of largest P(i, j)
    stream_llm (A-shape)  the first vertical tokens and the nearest slash tokens
    ```

    So a column costs a whole block of keys, and sizes that were searched for single columns keep fewer of them. The
    guards keep the first and the nearest blocks in addition. A size of at least the prompt keeps everything. A chunk is
    selected by its own last queries.

    Args:
        config (str | None): JSON file of the published format: for each layer a mapping of head numbers to
            ``[type, size, size, score]`` as in :class:`HeadPattern`. Heads that it doesn't list are vertical-slash with
            1000 and 6096. A strategy with a config must be bound to its layer by :meth:`for_layer`, as the models of
            this package do. Default: None.
        heads (Mapping[int, Sequence]): patterns of some query heads, by their number. Default: none.
        pattern (str): pattern of all other heads: "vertical_and_slash", "stream_llm" or "block_sparse". Default:
            "vertical_and_slash".
        vertical (int | None): their first size, see :class:`HeadPattern`. Default: an eighth of the prompt, but no more
            than 1000 tokens of columns or 100 blocks; 100 of "stream_llm".
        slash (int | None): their second size. Default: an eighth of the prompt, but no more than 6096 tokens of
            diagonals; 800 of "stream_llm". The 1000 and 6096 of most published heads would keep nearly everything of
            a prompt of 8K.
        last_q (int): last queries that represent the prompt, 1 or more. Default: 64.
        sink (int): first tokens that every query keeps. Default: 30.
        local (int): nearest keys that every query keeps. Default: 100.
        **guards: see :class:`~sparse_prefill.Strategy`.

    Raises:
        ValueError: if an option is out of range, ``config`` is given along with patterns or is no such file; from
            :meth:`for_layer`, if it has another number of layers; at a call, if there is no such head or the strategy
            isn't bound to a layer; from ``keep``, if a head is vertical-slash and the prompt has several documents.
    """

    paper = "MInference 1.0, Jiang et al., NeurIPS 2024 (arXiv 2407.02490), algorithms 2 and 3"
    reference = "microsoft/MInference@fb56c91: minference/modules/minference_forward.py"
    use = (
        "Take it for models with a pattern file, published or your own, and for prompts far over 8K tokens. Its time "
        "depends only on the length of the prompt, since budgets don't follow the content. Without a pattern file for "
        "the model, and for prompts of a few thousand tokens, try `flex_prefill` and `xattention` first: in the small "
        "model of the demo, the uniform vertical-slash pattern holds no more of the attention than sinks and a window "
        "of the same density."
    )
    differs = (
        "Columns and diagonals are whole blocks of the grid. The released kernel gathers single columns, and diagonals "
        "64 tokens wide that don't lie on the grid. The first 30 tokens and the nearest 100 keys are guards here; the "
        "released top-k counts them first. Our guards always keep the own block. The released code may lose it to ties "
        "if a slash size is under 100, and it forces neither the own nor the first block in block-sparse heads. Block "
        "means here are over real tokens only; the released code adds a block of zeros after prompts of whole blocks. "
        "The number of blocks of a block-sparse head is read from its entry; the released code always takes 100. Here "
        "all heads are estimated at once, and batches, chunks, padding and single queries are served."
    )
    chunk_invariant = False
    crossover = 2048
    tunable = TunableOption("vertical", 0, scale="tokens", also=("slash",))

    config: str | None = None
    heads: Mapping[int, HeadPattern] = field(default_factory=dict)
    pattern: str = "vertical_and_slash"
    vertical: int | None = None
    slash: int | None = None
    last_q: int = 64
    sink: int = 30
    local: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens("last_q", self.last_q, least=1)
        check_type("pattern", self.pattern)
        for name in ("vertical", "slash"):
            if getattr(self, name) is not None:
                check_tokens(name, getattr(self, name))
        object.__setattr__(self, "heads", check_patterns("heads", self.heads))
        if self.config is not None:
            if self.heads or (self.pattern, self.vertical, self.slash) != (TYPES[0], None, None):
                raise ValueError("config holds the patterns of all heads: drop heads, pattern, vertical and slash.")
            object.__setattr__(self, "config", str(self.config))
            load_patterns(self.config)

    def tunable_option(self) -> TunableOption | None:
        has_other_sizes = self.config is not None or self.heads or self.pattern == "block_sparse"
        return None if has_other_sizes else self.tunable

    def for_layer(self, layer: Layer) -> Strategy:
        if self.config is None:
            return self
        layers = load_patterns(self.config)
        if len(layers) != layer.count:
            raise ValueError(f"{self.config} has patterns for {len(layers)} layers, but the model has {layer.count}.")
        _, vertical, slash = UNLISTED
        return replace(self, config=None, heads=layers[layer.index], vertical=vertical, slash=slash)

    @property
    def indexes_heads(self) -> bool:
        return bool(self.heads)

    def for_heads(self, heads: slice, key_heads: slice) -> Strategy | None:
        own = {h - heads.start: pattern for h, pattern in self.heads.items() if heads.start <= h < heads.stop}
        return None if self.config is not None else replace(self, heads=own)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> _Scores:
        if self.config is not None:
            raise ValueError(
                "minference with a config has to know which layer it serves: take strategy.for_layer(sp.Layer(index, "
                "count)), or sparsify() the model with it."
            )
        beyond = [head for head in self.heads if head >= q.shape[1]]
        if beyond:
            raise ValueError(f"There is a pattern for head {beyond[0]}, but q has {q.shape[1]} heads, numbered from 0.")
        types = {pattern.type for pattern in self._patterns(q.shape[1])}
        representative = pooled = None
        if "vertical_and_slash" in types:
            check_one_document("minference", "its representative queries would all lie in the last one", prompt)
            representative = RepresentativeMass(queries=self.last_q)(q, k, prompt)
        if "block_sparse" in types:
            pooled = pooled_attention(query_means(q, prompt), key_means(k, prompt), prompt)
        return _Scores(q.shape[1], q.device, representative, pooled)

    def select(self, scores: _Scores, prompt: Prompt) -> Tensor:
        count, device, representative, pooled = scores
        patterns = self._patterns(count)
        keep = torch.zeros(prompt.batch, len(patterns), prompt.n_q, prompt.n_k, dtype=torch.bool, device=device)
        for sizes in {pattern[1:3] for pattern in patterns if pattern.type == "stream_llm"}:
            first, near = (given if given is not None else size for given, size in zip(sizes, A_SHAPE, strict=True))
            window = (prompt.sink_blocks(first, device) | prompt.local_blocks(near, device))[:, 0]
            for head, pattern in enumerate(patterns):
                if pattern[:3] == ("stream_llm", *sizes):
                    keep[:, head] = window
        visible = prompt.visible(device)
        if representative is not None:
            vertical, slash, *_ = representative
            vertical = vertical.masked_fill(~visible.any(2), -1)  # padding ranks last among columns without mass
            columns = top_k(vertical, _blocks(patterns, device, "vertical_and_slash", 0, prompt))
            diagonals = top_k(slash, _blocks(patterns, device, "vertical_and_slash", 1, prompt))
            keep = keep | columns[:, :, None] | by_diagonal(diagonals, prompt)
        if pooled is not None:
            best = _blocks(patterns, device, "block_sparse", 0, prompt)[..., None]
            keep = keep | top_k(pooled.masked_fill(~visible, -1), best)
        return keep

    def score_table(self, scores: _Scores, prompt: Prompt) -> Tensor:
        count, device, representative, pooled = scores
        patterns = self._patterns(count)
        table = torch.zeros(1, len(patterns), prompt.n_q, prompt.n_k, device=device)
        parts = {"block_sparse": pooled}
        if representative is not None:
            vertical, slash, *_ = representative
            parts["vertical_and_slash"] = torch.maximum(vertical[:, :, None], by_diagonal(slash, prompt))
        for name, part in parts.items():
            if part is not None:
                own = torch.tensor([pattern.type == name for pattern in patterns], device=device)[:, None, None]
                table = torch.where(own, part, table)
        return table

    def _patterns(self, count: int) -> list[HeadPattern]:
        """The pattern of each query head."""
        default = HeadPattern(self.pattern, self.vertical, self.slash)
        return [self.heads.get(head, default) for head in range(count)]


def _blocks(patterns: list[HeadPattern], device: torch.device, name: str, index: int, prompt: Prompt) -> Tensor:
    """Number of blocks that each head of a type keeps, by its first or second size: int64 [B, Hq, 1]; 0 for others."""
    unit = UNIT if name == "block_sparse" else 1
    given = tuple(pattern[1 + index] if pattern.type == name else 0 for pattern in patterns)

    def make() -> Tensor:
        each = [-1 if size is None else int(size) * unit for size in given]
        return _blocks_of(constants(each, torch.int64, device)[:, None], MOST[name][index], prompt)

    return prompt.cache.get(CacheKey("minference", device, (name, index, given)), make)


def _blocks_of(sizes: Tensor, most: int, prompt: Prompt) -> Tensor:
    length = (prompt.kv_len - prompt.start(sizes.device))[:, None, None]  # [B, 1, 1]
    tokens = torch.where(sizes < 0, (length // SHARE).clamp(min=1, max=most), sizes)
    # With left padding, a prompt may lie on one block more than its tokens fill.
    return torch.where(tokens < length, (tokens + prompt.block_size - 1) // prompt.block_size, prompt.n_k)

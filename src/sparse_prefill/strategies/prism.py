"""Prism: block means in the fast and in the slow dimensions of the rotary embedding, each with its own temperature."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_prefill.core.layer import Layer, RopeLayout
from sparse_prefill.core.option_checks import check_fraction
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators import Bands, SpectralBands
from sparse_prefill.registry import register_strategy
from sparse_prefill.selectors import CumulativeMass
from sparse_prefill.strategy import Strategy
from sparse_prefill.tunable_option import TunableOption


@register_strategy("prism")
@dataclass(frozen=True, kw_only=True)
class Prism(Strategy):
    """Keep what the block means of the fast, or those of the slow rotary dimensions, find important.

    The mean of a block cancels dimensions that the rotary embedding turns fast, and with them what a query says about
    near positions; in a product of whole means the slow dimensions drown the rest. So both bands are scored by
    themselves, with temperatures that make up for the loss, as
    :class:`~sparse_prefill.estimators.SpectralBands` says. In each query block each band keeps the fewest key blocks
    that hold ``share`` of its own attention, and what either keeps is kept.

    It has to know how the model lays out its rotary embedding. A model door tells it (:meth:`for_layer`); used without
    one, as ``sparse_attention(q, k, v, "prism")``, all dimensions are taken to rotate, in the half-split layout,
    unless ``rope`` and ``rotated`` say otherwise.

    The temperatures depend on all blocks of the prompt, those of the last queries too, so a prompt that is prefilled in
    chunks selects other blocks than in one piece.

    Args:
        share (float): share of each band's pooled attention to keep, in (0, 1]. Default: 0.95.
        high (int | None): rotated dimensions in the high band, an even number. Default: half of them, i.e. 64 of 128 as
            published.
        low (int | None): rotated dimensions in the low band, an even number; the bands may overlap. Default: three
            quarters of them, i.e. 96 of 128 as published.
        rope (str | None): which dimensions rotate together, "half_split" or "interleaved", as for
            :class:`~sparse_prefill.Rope`. Default: what the layer says, "half_split" where none does.
        rotated (int | None): dimensions of a head that rotate, the first ones, an even number. The others stand still
            and belong to the low band, besides ``low``. Default: what the layer says, all where none does.
        **guards: see :class:`~sparse_prefill.Strategy`; ``sink`` is 1 token, i.e. the first block is always kept.

    Raises:
        ValueError: if an option is out of range, or contradicts the layer; at a call, if heads are narrower than an
            option says; from ``keep``, if the prompt is of several documents.
    """

    paper = "Prism: Spectral-Aware Block-Sparse Attention, ICML 2026 (arXiv 2602.08426)"
    reference = "xinghaow99/prism: prism/prism.py"
    use = (
        "Take it where the estimate has to cost next to nothing, as on very long prompts: like `mean_pool` it reads "
        "each query and key once and multiplies block means. Don't take it for models without a rotary embedding, "
        "where the bands mean nothing, and compare it with `mean_pool` at equal density first: on SmolLM2-135M, with "
        "heads of 64 dimensions and 8,000 tokens, the second band found no more than a larger share of plain means did."
    )
    differs = (
        "Means are over real tokens only: the released code fills a ragged last block with zeros, which shrinks its "
        "mean, its score and the temperatures. Query blocks that lie across two blocks of keys, as in a chunk behind "
        "a prefix of no whole number of blocks, see and keep both: there it takes the block grids of queries and keys "
        "to end together, and loses the later one. It knows the half-split layout alone, and heads that rotate whole. "
        "Its first block is forced, here it is the guard `sink`. Equal scores are ranked the earlier block first."
    )
    chunk_invariant = False
    head_independent = True
    crossover = 2048
    crossover_of_gpu = 65536
    tunable = TunableOption("share", 0.01, 1.0)

    share: float = 0.95
    high: int | None = None
    low: int | None = None
    rope: RopeLayout | None = None
    rotated: int | None = None
    sink: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("share", self.share)
        self._estimator()

    def for_layer(self, layer: Layer) -> Strategy:
        """This strategy with the layer's rotary embedding, or unchanged where the layer tells of none.

        Raises:
            ValueError: if ``rope`` or ``rotated`` is given and contradicts the layer.
        """
        if layer.rope is None:
            return self
        rope, rotated = layer.rope.layout, 2 * len(layer.rope.frequencies)
        for name, given, told in (("rope", self.rope, rope), ("rotated", self.rotated, rotated)):
            if given not in (None, told):
                raise ValueError(
                    f"prism has {name}={given!r}, but layer {layer.index} has {told!r}: leave it out, and the layer's "
                    "is taken."
                )
        return replace(self, rope=rope, rotated=rotated)

    def score(self, q: Tensor, k: Tensor, prompt: Prompt) -> Bands:
        check_one_document("prism", "the temperature of a band is one for all blocks", prompt)
        return self._estimator()(q, k, prompt)

    def select(self, scores: Bands, prompt: Prompt) -> Tensor:
        selector = CumulativeMass(share=self.share)
        return selector(scores.high, prompt) | selector(scores.low, prompt)

    def score_table(self, scores: Bands, prompt: Prompt) -> Tensor:
        return torch.maximum(scores.high, scores.low)

    def _estimator(self) -> SpectralBands:
        rope: RopeLayout = "half_split" if self.rope is None else self.rope
        return SpectralBands(rope=rope, rotated=self.rotated, high=self.high, low=self.low)

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
    """Keep the blocks that are important by block means, in the fast or in the slow rotary dimensions.

    The mean of a block cancels dimensions that the rotary embedding turns fast, and so the information on near
    positions. In a product of whole means, the slow dimensions hide what is left of it. So both bands are scored
    separately, with temperatures t that restore the size of the products. For a band z of d_z of the D dimensions, with
    qm and km the block means and RMS over all blocks of a head:

    ```text
    t_z = sqrt(d_z / D) * RMS(qm_z) / RMS(qm) * RMS(km_z) / RMS(km)
    P_z(i, j) = softmax over j of qm_z(i) . km_z(j) / (sqrt(d_z) t_z)
    keep, in each row i, the fewest j with sum of P_high(i, j) >= share, and the same for P_low
    ```

    See :class:`~sparse_prefill.estimators.SpectralBands`. The method needs the layout of the rotary embedding. Models
    give it by :meth:`for_layer`. Without a model, as in ``sparse_attention(q, k, v, "prism")``, all dimensions rotate,
    in the half-split layout, unless ``rope`` and ``rotated`` say otherwise.

    The temperatures depend on all blocks of the prompt, so chunks select other blocks than the prompt in one piece.

    Args:
        share (float): share of each band's pooled attention to keep, in (0, 1]. Default: 0.95.
        high (int | None): rotated dimensions in the high band, an even number. Default: half of them, i.e. 64 of 128 as
            published.
        low (int | None): rotated dimensions in the low band, an even number; the bands may overlap. Default: three
            quarters of them, i.e. 96 of 128 as published.
        rope (str | None): which dimensions rotate together, "half_split" or "interleaved", as for
            :class:`~sparse_prefill.Rope`. Default: that of the layer, "half_split" without one.
        rotated (int | None): dimensions of a head that rotate, the first ones, an even number. The others belong to the
            low band in addition to ``low``. Default: that of the layer, all dimensions without one.
        **guards: see :class:`~sparse_prefill.Strategy`; ``sink`` is 1 token, i.e. the first block is always kept.

    Raises:
        ValueError: if an option is out of range, or contradicts the layer; at a call, if heads are narrower than an
            option says; from ``keep``, if the prompt has several documents.
    """

    paper = "Prism: Spectral-Aware Block-Sparse Attention, ICML 2026 (arXiv 2602.08426)"
    reference = "xinghaow99/prism: prism/prism.py"
    use = (
        "Take it if the estimate has to cost very little, as on very long prompts: like `mean_pool`, it reads each "
        "query and key once and multiplies block means. Don't take it for models without a rotary embedding: they have "
        "no bands. Compare it with `mean_pool` at equal density first: on SmolLM2-135M, with heads of 64 dimensions "
        "and 8,000 tokens, the second band found no more than a larger share of plain means did."
    )
    differs = (
        "Means here are over real tokens only. The released code fills a ragged last block with zeros, which shrinks "
        "its mean, its score and the temperatures. After a prefix that is not a whole number of blocks, a query block "
        "lies across two key blocks. Here it sees and keeps both; the released code loses the later one, since it "
        "assumes that the block grids of queries and keys end together. The released code only knows the half-split "
        "layout, and heads that rotate in all dimensions. It forces the first block, which is the guard `sink` here. "
        "Of equal scores, the earlier block ranks higher here."
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
        """This strategy with the layer's rotary embedding, or unchanged if the layer has none.

        Raises:
            ValueError: if ``rope`` or ``rotated`` is given and contradicts the layer.
        """
        if layer.rope is None:
            return self
        rope, rotated = layer.rope.layout, 2 * len(layer.rope.frequencies)
        for name, given, known in (("rope", self.rope, rope), ("rotated", self.rotated, rotated)):
            if given not in (None, known):
                raise ValueError(
                    f"prism has {name}={given!r}, but layer {layer.index} has {known!r}: leave it out to take the "
                    "layer's."
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

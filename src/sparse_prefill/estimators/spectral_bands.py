"""Attention between the means of blocks, in the fast and in the slow dimensions of a rotary embedding by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.fused import compile_on_gpu
from sparse_prefill.core.layer import RopeLayout
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.prompt_cache import CacheKey
from sparse_prefill.core.tensor_checks import check_one_document
from sparse_prefill.estimators.block_means import key_means, query_means
from sparse_prefill.estimators.pooled import pooled_attention
from sparse_prefill.registry import register_estimator


class Bands(NamedTuple):
    """Pooled attention of the fast and of the slow dimensions, each fp32 [B, Hq, n_q, n_k]; rows sum to 1."""

    high: Tensor
    low: Tensor


@register_estimator("spectral_bands")
@dataclass(frozen=True, kw_only=True)
class SpectralBands:
    """Softmax over the visible key blocks of the product of block means, in two bands of a head's dimensions.

    The mean of a block cancels dimensions that turn fast within it, and what is left of them drowns among the slow
    ones. So the fast (high) and the slow (low) pairs of the rotary embedding are scored by themselves, each with a
    temperature that gives its products the size that those of all dimensions have: with the root mean square taken over
    the block means of a head, that of band z, d_z of d dimensions wide, is
    sqrt(d_z / d) RMS(q_z) / RMS(q) RMS(k_z) / RMS(k), and its products are divided by it and by sqrt(d_z).

    Means are taken over real tokens only, and blocks without any count nowhere. Scratch memory is four tables of
    B x Hq x n_q x n_k in fp32: 0.5 GB for 32 heads at 128K tokens in blocks of 128.

    Args:
        rope (str): which dimensions rotate together, "half_split" or "interleaved", as for
            :class:`~sparse_prefill.Rope`. Default: "half_split".
        rotated (int | None): dimensions of a head that rotate, the first ones, an even number. The others stand still
            and belong to the low band. Default: all.
        high (int | None): rotated dimensions in the high band, an even number. Default: half of them, in whole pairs.
        low (int | None): rotated dimensions in the low band, an even number; the bands may overlap. Default: three
            quarters of them, in whole pairs.

    Raises:
        ValueError: if an option is out of range; at a call, if heads are narrower than an option says, or the prompt
            is of several documents.
    """

    rope: RopeLayout = "half_split"
    rotated: int | None = None
    high: int | None = None
    low: int | None = None

    def __post_init__(self) -> None:
        if self.rope not in get_args(RopeLayout):
            raise ValueError(f"rope must be one of {', '.join(get_args(RopeLayout))}, got {self.rope!r}.")
        for name in ("rotated", "high", "low"):
            value = getattr(self, name)
            if value is not None:
                check_tokens(name, value, least=2)
                if value % 2:
                    raise ValueError(f"{name} must be an even number, as dimensions rotate in pairs, got {value!r}.")

    @own_precision
    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Bands:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): what the tokens are.

        Returns:
            Bands: the scores of both bands.
        """
        check_one_document("The spectral bands estimator", "the temperature of a band is one for all blocks", prompt)
        q_means, k_means = query_means(q, prompt), key_means(k, prompt)
        high, low = self._bands_of(q, prompt)
        return Bands(
            pooled_attention(_band(q_means, high), _band(k_means, high), prompt),
            pooled_attention(_band(q_means, low), _band(k_means, low), prompt),
        )

    def _bands_of(self, q: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
        key = CacheKey("spectral bands", q.device, (self, q.shape[-1]))
        return prompt.cache.get(key, lambda: self.bands(q.shape[-1], q.device))

    def bands(self, dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Which dimensions of a head are in the high and in the low band: bool [dim] each."""
        rotated = dim // 2 * 2 if self.rotated is None else self.rotated
        high = max(2, rotated // 4 * 2) if self.high is None else self.high
        low = max(2, 3 * rotated // 8 * 2) if self.low is None else self.low
        if rotated > dim or max(high, low) > rotated:
            raise ValueError(
                f"high={high} and low={low} must be at most rotated={rotated} dimensions, and these at most the "
                f"head_dim {dim}: give smaller numbers, or None for shares of what rotates."
            )
        dims = torch.arange(dim, device=device)
        pair = dims % (rotated // 2) if self.rope == "half_split" else dims // 2  # the fastest pair is 0
        turning = dims < rotated
        return turning & (pair < high // 2), ~turning | (pair >= (rotated - low) // 2)


@compile_on_gpu
def _band(means: Tensor, inside: Tensor) -> Tensor:
    """Block means [B, H, n, D] in some dimensions, 0 in the others, stretched to the norm that all dimensions have.

    The product of two such tables is that of the band over its temperature, where RMS, sqrt(d_z) and sqrt(d) are
    collected into norms. Blocks of padding are 0 and add nothing to a norm.
    """
    band = means * inside
    norm, whole = (torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True) for x in (band, means))
    share = norm / whole.clamp(min=torch.finfo(means.dtype).tiny)
    return band / share.clamp(min=1e-6)  # a band that is 0 stays 0

"""Attention between block means, separately in the fast and in the slow dimensions of a rotary embedding."""

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
    """Pooled attention in the fast (high) and the slow (low) dimensions, fp32 [B, Hq, n_q, n_k]. Rows sum to 1."""

    high: Tensor
    low: Tensor


@register_estimator("spectral_bands")
@dataclass(frozen=True, kw_only=True)
class SpectralBands:
    """Softmax over the visible key blocks of the products of block means, in two bands of a head's dimensions.

    Dimensions that rotate fast average out in a block mean, so the slow ones dominate its products. Here the fast
    (high) and the slow (low) dimensions are scored separately. For band z, d_z of the D dimensions wide, let Q_z and
    K_z be the block means of a head in these dimensions and RMS the root mean square over blocks and dimensions:

        tau_z = sqrt(d_z / D) * RMS(Q_z) / RMS(Q) * RMS(K_z) / RMS(K)
        score_z[i, j] = softmax over the visible j of Q_z[i] . K_z[j] / (sqrt(d_z) tau_z)

    The temperature tau_z gives the products of a band the magnitude of those of all dimensions. This is the estimate of
    Prism (arXiv 2602.08426) as in its released code.

    Means are taken over real tokens only. Blocks without real tokens don't count in the RMS. Scratch memory is four
    tables of B x Hq x n_q x n_k in fp32: 0.5 GB for 32 heads at 128K tokens in blocks of 128.

    Args:
        rope (str): which dimensions rotate together, "half_split" or "interleaved", as for
            :class:`~sparse_prefill.Rope`. Default: "half_split".
        rotated (int | None): number of first dimensions of a head that rotate, even. The others belong to the low band.
            Default: all.
        high (int | None): number of rotated dimensions in the high band, the fastest ones, even. Default: half of them,
            in whole pairs.
        low (int | None): number of rotated dimensions in the low band, the slowest ones, even; the bands may overlap.
            Default: three quarters of them, in whole pairs.

    Raises:
        ValueError: if an option is out of range; at a call, if a head has fewer dimensions than an option says, or if
            the prompt has several documents.
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
            prompt (Prompt): lengths and padding of the tokens.

        Returns:
            Bands: the scores of both bands.
        """
        check_one_document("The spectral bands estimator", "all blocks share the temperature of a band", prompt)
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
                f"head_dim {dim}: give smaller numbers, or None for the default shares."
            )
        dims = torch.arange(dim, device=device)
        pair = dims % (rotated // 2) if self.rope == "half_split" else dims // 2  # the fastest pair is 0
        turning = dims < rotated
        return turning & (pair < high // 2), ~turning | (pair >= (rotated - low) // 2)


@compile_on_gpu
def _band(means: Tensor, inside: Tensor) -> Tensor:
    """Block means [B, H, n, D] in the dimensions ``inside``, 0 in the others, scaled to the norm of all dimensions.

    As RMS(x_z) = |x_z| / sqrt(n d_z), the factors sqrt(d_z) and sqrt(D) of tau_z cancel: with x'_z = x_z |x| / |x_z|,
    the logit is Q'_z . K'_z / sqrt(D). Blocks of padding are 0 and add nothing to a norm.
    """
    band = means * inside
    norm, whole = (torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True) for x in (band, means))
    share = norm / whole.clamp(min=torch.finfo(means.dtype).tiny)
    return band / share.clamp(min=1e-6)  # a band that is 0 stays 0

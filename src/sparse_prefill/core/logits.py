"""The options of attention logits: scale, soft cap and sinks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Logits:
    """Scale, soft cap and sinks of an attention layer.

    Args:
        scale (float | None): factor of the products. Default: head_dim ** -0.5.
        softcap (float | None): logits become softcap * tanh(logits / softcap). Default: None.
        sinks (Tensor | None): one more logit per query head, [Hq]. It takes a share of the softmax and has no value.
            Default: None.

    Raises:
        ValueError: if the scale or the cap isn't a positive number, or the sinks aren't a vector.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        if self.sinks is not None and (not isinstance(self.sinks, Tensor) or self.sinks.ndim != 1):
            raise ValueError(f"sinks must be a tensor of one logit per query head [Hq], got {self.sinks!r}.")

    @property
    def are_plain(self) -> bool:
        """Whether logits are scaled products: no soft cap, no sinks."""
        return self.softcap is None and self.sinks is None

    def check(self, q: Tensor) -> None:
        """Raise ValueError unless there is a sink for each head of q [B, Hq, M, D], on its device."""
        if self.sinks is not None and (len(self.sinks) != q.shape[1] or self.sinks.device != q.device):
            raise ValueError(
                f"sinks must be {q.shape[1]} logits on {q.device}, one for each query head, got {len(self.sinks)} on "
                f"{self.sinks.device}."
            )


PLAIN = Logits()


def attend_rows(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, logits: Logits) -> Tensor:
    """Attention of a few rows, with all their logits in memory; rows that may attend to nothing are 0.

    Args:
        q (Tensor): queries [B, Hq, m, D].
        k (Tensor): keys [B, Hkv, n, D].
        v (Tensor): values [B, Hkv, n, Dv].
        allowed (Tensor): which pairs may attend, bool [B or 1, 1, m, n].
        logits (Logits): scale, soft cap and sinks.

    Returns:
        Tensor: [B, Hq, m, Dv].
    """
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    # Heads of a group become further rows of their key head.
    grouped = q.reshape(batch, kv_heads, heads // kv_heads * rows, dim)
    allowed = allowed.repeat(1, 1, heads // kv_heads, 1)
    if logits.are_plain:
        out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=allowed, scale=logits.scale)
        out = out.masked_fill(~allowed.any(-1, keepdim=True), 0)
        return out.reshape(batch, heads, rows, -1)
    products = (grouped @ k.transpose(2, 3)).float() * (dim**-0.5 if logits.scale is None else logits.scale)
    if logits.softcap is not None:
        products = logits.softcap * (products / logits.softcap).tanh()
    products = products.masked_fill(~allowed, -math.inf)
    nothing = torch.full((heads,), -math.inf, device=q.device)
    sinks = nothing if logits.sinks is None else logits.sinks.float()
    sinks = sinks.view(kv_heads, -1, 1).expand(-1, -1, rows).reshape(1, kv_heads, -1, 1)
    top = torch.maximum(products.amax(-1, keepdim=True), sinks).clamp(min=torch.finfo(torch.float32).min)
    weights = (products - top).exp()
    total = weights.sum(-1, keepdim=True) + (sinks - top).exp()
    shares = weights / total.clamp(min=torch.finfo(torch.float32).tiny)
    return (shares.to(v.dtype) @ v).reshape(batch, heads, rows, -1)

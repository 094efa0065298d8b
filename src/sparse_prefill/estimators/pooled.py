"""Attention between the means of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from sparse_prefill.estimators.block_means import key_means, query_means
from sparse_prefill.fused import fused, powers
from sparse_prefill.prompt import Prompt
from sparse_prefill.registry import register_estimator

# Softmax of logits is that of powers of 2 of logits times this. On CPUs, torch 2.13 takes 50 times as long for exp of a
# number under -88, as logits far below the highest are, than of others; not so for exp2.
LOG2_E = 1 / math.log(2)
LEAST, TINY = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny  # for a query that sees nothing


@register_estimator("pooled_attention")
@dataclass(frozen=True, kw_only=True)
class PooledAttention:
    """Softmax over the visible key blocks of the product of query-block means and key-block means.

    Means are taken over real tokens only. Each query block's row sums to 1. Scratch memory is
    B x Hq x n_q x n_k in fp32.
    """

    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): what the tokens are.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k].
        """
        return pooled_attention(query_means(q, prompt), key_means(k, prompt), prompt)


def pooled_attention(q_means: Tensor, k_means: Tensor, prompt: Prompt, among: Tensor | None = None) -> Tensor:
    """Softmax over the visible blocks of q_means [B, Hq, n_q, D] times k_means [B, Hkv, n_k, D]: [B, Hq, n_q, n_k].

    With ``among``, bool, broadcastable to [B, Hq, n_q, n_k], only the blocks in it share the softmax; others have 0.
    """
    scored = prompt.visible(q_means.device) if among is None else prompt.visible(q_means.device) & among
    return softmax_among(group_product(q_means, k_means), scored, q_means.shape[-1] ** -0.5)


@fused
def softmax_among(logits: Tensor, scored: Tensor, scale: float) -> Tensor:
    """Softmax of ``scale`` times logits over those that are ``scored``; others have 0, as all have where none is."""
    logits = (logits * (scale * LOG2_E)).masked_fill(~scored, -torch.inf)
    shares = powers(logits, logits.amax(-1, keepdim=True).clamp(min=LEAST))
    return shares / shares.sum(-1, keepdim=True).clamp(min=TINY)


def group_product(q: Tensor, k: Tensor) -> Tensor:
    """q [B, Hq, m, D] times k [B, Hkv, n, D] transposed, each query head with its own key head: [B, Hq, m, n]."""
    rows = rearrange(q, "b (hkv group) m d -> b hkv (group m) d", hkv=k.shape[1])
    return rearrange(rows @ k.mT, "b hkv (group m) n -> b (hkv group) m n", m=q.shape[2])


def group_logits(q: Tensor, k: Tensor, scale: float, *, rounded: bool = False) -> tuple[Tensor, float]:
    """:func:`group_product` in fp32 whatever the inputs, and what is still to be multiplied with for ``scale``.

    GPUs multiply half precision as it is and sum in fp32; a product by the scale would be one more pass over the
    logits, so it is left to whoever reads them. CPUs scale within the product. They have no such sums in PyTorch: they
    multiply fp32, or, with ``rounded``, the inputs as they are, whose products are then rounded to their dtype. In bf16
    that is an error of up to a 512th of a logit, so high ones tie.
    """
    half = gpu_multiplies(q) and q.dtype == k.dtype
    q, k = (q, k) if half or rounded else (q.float(), k.float())
    rows, keys = rearrange(q, "b (hkv group) m d -> (b hkv) (group m) d", hkv=k.shape[1]), k.flatten(0, 1).mT
    if half:
        logits, rest = torch.bmm(rows, keys, out_dtype=torch.float32), scale
    else:  # its first argument counts 0 times
        logits, rest = torch.baddbmm(rows.new_empty(1), rows, keys, beta=0, alpha=scale).float(), 1.0
    return rearrange(logits, "(b hkv) (group m) n -> b (hkv group) m n", b=q.shape[0], m=q.shape[2]), rest


def mean_logits(q: Tensor, means: Tensor) -> Tensor:
    """:func:`group_product` of queries in any dtype with fp32 keys, in fp32.

    GPUs multiply half precision at many times the rate of fp32. There keys are the sum of two parts in the dtype of the
    queries, the second of which is what rounding takes from the first: together they have 16 binary digits in bf16 and
    22 in fp16, and products are summed in fp32.
    """
    if not gpu_multiplies(q):
        return group_product(q.float(), means)
    high = means.to(q.dtype)
    low = (means - high).to(q.dtype)
    return group_logits(_twice(q), torch.cat([high, low], dim=-1), 1.0)[0]


def _twice(q: Tensor) -> Tensor:
    """q [..., D] beside itself, [..., 2 D]; copied 16 bytes at a time where it can be."""
    word = 16 // q.element_size()
    if q.stride(-1) == 1 and all(n % word == 0 for n in (q.shape[-1], q.storage_offset(), *q.stride()[:-1])):
        wide = q.view(torch.complex128)
        return torch.cat([wide, wide], dim=-1).view(q.dtype)
    return torch.cat([q, q], dim=-1)


def gpu_multiplies(q: Tensor) -> bool:
    """Whether products of q are those of half precision, summed in fp32."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)

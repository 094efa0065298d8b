"""Attention between the means of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sparse_prefill.core.autocast import own_precision
from sparse_prefill.core.fused import compile_on_gpu, exp2_shifted
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.core.renamed import former_options
from sparse_prefill.estimators.block_means import key_means, query_means
from sparse_prefill.estimators.block_shares import LEAST, LOG2_E, TINY, block_shares
from sparse_prefill.registry import register_estimator

# Logits that are held at once: about as many as stay in the cache of a CPU, and enough for GPUs not to wait for the
# next launch.
MAX_LOGITS_CPU, MAX_LOGITS_GPU = 2**21, 2**28


@register_estimator("pooled_attention")
@former_options(grain="pool_size")
@dataclass(frozen=True, kw_only=True)
class PooledAttention:
    """Softmax over the visible key blocks of the product of query-block means and key-block means.

    Means are taken over real tokens only. Each query block's row sums to 1. Scratch memory is
    B x Hq x n_q x n_k in fp32.

    A mean hides what single tokens look at. With a ``pool_size`` under the block size, means are of as many tokens, and
    the shares of those in a query block are averaged, those of keys in a block summed up. For r means in a block that
    takes r^2 times as many products and exponentials, of which 2^21 are held at once on a CPU and 2^28 elsewhere.

    Args:
        pool_size (int | None): tokens that a mean is of, a power of two, at least 16. Default: all of a block.

    Raises:
        ValueError: if ``pool_size`` is no power of two or under 16; at a call, if it is over the block size.
    """

    pool_size: int | None = None

    def __post_init__(self) -> None:
        if self.pool_size is not None:
            check_pool_size(self.pool_size)

    @own_precision
    def __call__(self, q: Tensor, k: Tensor, prompt: Prompt) -> Tensor:
        """Score.

        Args:
            q (Tensor): queries [B, Hq, M, D].
            k (Tensor): keys [B, Hkv, N, D].
            prompt (Prompt): what the tokens are.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k].
        """
        if self.pool_size is None or self.pool_size == prompt.block_size:
            return pooled_attention(query_means(q, prompt), key_means(k, prompt), prompt)
        if self.pool_size > prompt.block_size:
            raise ValueError(
                f"pool_size must be at most the block size, got {self.pool_size} and block_size={prompt.block_size}: "
                "give fewer tokens, or leave it out for means of whole blocks."
            )
        return _finer_attention(q, k, prompt, prompt.on_grid(self.pool_size))


def check_pool_size(pool_size: int) -> None:
    """Raise ValueError unless ``pool_size`` is a power of two, at least 16."""
    if isinstance(pool_size, bool) or not isinstance(pool_size, int) or pool_size < 16 or pool_size & (pool_size - 1):
        raise ValueError(f"pool_size must be a power of two, at least 16 tokens, got {pool_size!r}.")


def _finer_attention(q: Tensor, k: Tensor, prompt: Prompt, fine: Prompt) -> Tensor:
    """Attention between the means of a finer grid, in blocks of the prompt's: fp32 [B, Hq, n_q, n_k]."""
    q_means, k_means = query_means(q, fine), key_means(k, fine)
    batch, heads, device, each = q.shape[0], q.shape[1], q.device, prompt.block_size // fine.block_size
    held = MAX_LOGITS_CPU if device.type == "cpu" else MAX_LOGITS_GPU
    at_once = max(1, held // (batch * heads * each * fine.n_k))
    scores = torch.zeros(batch, heads, prompt.n_q, prompt.n_k, device=device)
    for begin in range(0, prompt.n_q, at_once):
        end = min(begin + at_once, prompt.n_q)
        rows = slice(begin * each, min(end * each, fine.n_q))
        seen = min(-(-(prompt.offset + end * prompt.block_size) // prompt.block_size) * each, fine.n_k)
        logits, rest = group_logits(q_means[:, :, rows], k_means[:, :, :seen], LOG2_E * q.shape[-1] ** -0.5)
        scored = fine.visible(device) if end - begin == prompt.n_q else fine.visible_rows(rows, device)
        masked = slice(fine.num_common_keys(prompt.offset + begin * prompt.block_size) // fine.block_size, seen)
        logits[..., masked].masked_fill_(~scored[..., masked], -torch.inf)
        shares = block_shares(logits, each, rest)
        shares = F.pad(shares, (0, 0, 0, (end - begin) * each - shares.shape[2])).unflatten(2, (-1, each)).sum(3)
        scores[:, :, begin:end, : shares.shape[-1]] = shares
    return scores / scores.sum(-1, keepdim=True).clamp(min=TINY)  # of rows that are no padding


def pooled_attention(q_means: Tensor, k_means: Tensor, prompt: Prompt, among: Tensor | None = None) -> Tensor:
    """Softmax over the visible blocks of q_means [B, Hq, n_q, D] times k_means [B, Hkv, n_k, D]: [B, Hq, n_q, n_k].

    With ``among``, bool, broadcastable to [B, Hq, n_q, n_k], only the blocks in it share the softmax; others have 0.
    """
    scored = prompt.visible(q_means.device) if among is None else prompt.visible(q_means.device) & among
    return softmax_among(group_product(q_means, k_means), scored, q_means.shape[-1] ** -0.5)


@compile_on_gpu
def softmax_among(logits: Tensor, scored: Tensor, scale: float) -> Tensor:
    """Softmax of ``scale`` times logits over those that are ``scored``; others have 0, as all have where none is."""
    logits = (logits * (scale * LOG2_E)).masked_fill(~scored, -torch.inf)
    shares = exp2_shifted(logits, logits.amax(-1, keepdim=True).clamp(min=LEAST))
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

"""Attention between block means."""

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
from sparse_prefill.estimators.block_shares import LOG2_E, LOWEST, TINY, block_shares
from sparse_prefill.registry import register_estimator

# Logits that an estimate holds at once: about as many as a CPU's cache holds, and enough to keep a GPU busy.
MAX_LOGITS_CPU, MAX_LOGITS_GPU = 2**21, 2**28


@register_estimator("pooled_attention")
@former_options(grain="pool_size")
@dataclass(frozen=True, kw_only=True)
class PooledAttention:
    """Softmax over the visible key blocks of the products of block means.

    With Q_i and K_j the means of the real tokens of query block i and key block j:

        score[i, j] = softmax over the visible j of Q_i . K_j / sqrt(D)

    This is the estimate of MInference's block-sparse heads (arXiv 2407.02490, Algorithm 3). Each query block's row sums
    to 1. Scratch memory is B x Hq x n_q x n_k in fp32.

    A mean hides the attention of single tokens. With a ``pool_size`` below the block size, means cover fewer tokens:
    the same softmax over these finer means is summed over the means of a key block and averaged over the means of a
    query block. With r means in a block, that takes r^2 times as many products and exponentials; 2^21 of them are held
    at once on a CPU and 2^28 elsewhere.

    Args:
        pool_size (int | None): tokens in a mean, a power of two, at least 16. Default: the block size.

    Raises:
        ValueError: if ``pool_size`` isn't a power of two or is below 16; at a call, if it exceeds the block size.
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
            prompt (Prompt): lengths and padding of the tokens.

        Returns:
            Tensor: fp32 [B, Hq, n_q, n_k].
        """
        if self.pool_size is None or self.pool_size == prompt.block_size:
            return pooled_attention(query_means(q, prompt), key_means(k, prompt), prompt)
        if self.pool_size > prompt.block_size:
            raise ValueError(
                f"pool_size must be at most the block size, got {self.pool_size} and block_size={prompt.block_size}: "
                "give a smaller one, or leave it out for means of whole blocks."
            )
        return _finer_attention(q, k, prompt, prompt.on_grid(self.pool_size))


def check_pool_size(pool_size: int) -> None:
    """Raise ValueError unless ``pool_size`` is a power of two, at least 16."""
    if isinstance(pool_size, bool) or not isinstance(pool_size, int) or pool_size < 16 or pool_size & (pool_size - 1):
        raise ValueError(f"pool_size must be a power of two, at least 16 tokens, got {pool_size!r}.")


def _finer_attention(q: Tensor, k: Tensor, prompt: Prompt, fine: Prompt) -> Tensor:
    """Attention between the means of the finer grid ``fine``, summed to the prompt's blocks: fp32 [B, Hq, n_q, n_k]."""
    q_means, k_means = query_means(q, fine), key_means(k, fine)
    batch, heads, device, each = q.shape[0], q.shape[1], q.device, prompt.block_size // fine.block_size
    limit = MAX_LOGITS_CPU if device.type == "cpu" else MAX_LOGITS_GPU
    at_once = max(1, limit // (batch * heads * each * fine.n_k))
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
    return scores / scores.sum(-1, keepdim=True).clamp(min=TINY)  # rows of padding add nothing


def pooled_attention(q_means: Tensor, k_means: Tensor, prompt: Prompt, among: Tensor | None = None) -> Tensor:
    """Softmax over the visible blocks of the products of block means.

    Args:
        q_means (Tensor): fp32 [B, Hq, n_q, D].
        k_means (Tensor): fp32 [B, Hkv, n_k, D].
        prompt (Prompt): lengths and padding of the tokens.
        among (Tensor | None): blocks that share the softmax, bool, broadcastable to [B, Hq, n_q, n_k]; others have 0.
            Default: all visible blocks.

    Returns:
        Tensor: fp32 [B, Hq, n_q, n_k].
    """
    scored = prompt.visible(q_means.device) if among is None else prompt.visible(q_means.device) & among
    return softmax_among(group_product(q_means, k_means), scored, q_means.shape[-1] ** -0.5)


@compile_on_gpu
def softmax_among(logits: Tensor, scored: Tensor, scale: float) -> Tensor:
    """Softmax of ``scale`` times logits over the ``scored`` entries; others have 0, and a row without any is all 0."""
    logits = (logits * (scale * LOG2_E)).masked_fill(~scored, -torch.inf)
    shares = exp2_shifted(logits, logits.amax(-1, keepdim=True).clamp(min=LOWEST))
    return shares / shares.sum(-1, keepdim=True).clamp(min=TINY)


def group_product(q: Tensor, k: Tensor) -> Tensor:
    """Products of q [B, Hq, m, D] and k [B, Hkv, n, D], each query head with its own key head: [B, Hq, m, n]."""
    rows = rearrange(q, "b (hkv group) m d -> b hkv (group m) d", hkv=k.shape[1])
    return rearrange(rows @ k.mT, "b hkv (group m) n -> b (hkv group) m n", m=q.shape[2])


def group_logits(q: Tensor, k: Tensor, scale: float, *, rounded: bool = False) -> tuple[Tensor, float]:
    """:func:`group_product` in fp32 for inputs of any dtype, and the factor that the caller still has to apply.

    GPUs multiply half precision and sum in fp32. Scaling would be one more pass over the logits there, so the scale is
    returned. CPUs scale within the product, and the returned factor is 1. On CPUs PyTorch doesn't sum products of half
    precision in fp32, so inputs are cast to fp32. With ``rounded`` they keep their dtype, to which the products are
    rounded: in bf16 the error is up to 1/512 of a logit, so large logits that are close become equal.
    """
    half = gpu_multiplies(q) and q.dtype == k.dtype
    q, k = (q, k) if half or rounded else (q.float(), k.float())
    rows, keys = rearrange(q, "b (hkv group) m d -> (b hkv) (group m) d", hkv=k.shape[1]), k.flatten(0, 1).mT
    if half:
        logits, rest = torch.bmm(rows, keys, out_dtype=torch.float32), scale
    else:  # beta=0 leaves out the first argument
        logits, rest = torch.baddbmm(rows.new_empty(1), rows, keys, beta=0, alpha=scale).float(), 1.0
    return rearrange(logits, "(b hkv) (group m) n -> b (hkv group) m n", b=q.shape[0], m=q.shape[2]), rest


def mean_logits(q: Tensor, means: Tensor) -> Tensor:
    """:func:`group_product` of queries in any dtype with fp32 means, in fp32.

    GPUs multiply half precision many times faster than fp32. So each mean is split there into two parts in the queries'
    dtype, the rounded mean and its rounding error. Together they have 16 binary digits in bf16 and 22 in fp16. Products
    are summed in fp32.
    """
    if not gpu_multiplies(q):
        return group_product(q.float(), means)
    high = means.to(q.dtype)
    low = (means - high).to(q.dtype)
    return group_logits(_twice(q), torch.cat([high, low], dim=-1), 1.0)[0]


def _twice(q: Tensor) -> Tensor:
    """q [..., D] concatenated with itself, [..., 2 D]; copied 16 bytes at a time where its layout allows that."""
    word = 16 // q.element_size()
    if q.stride(-1) == 1 and all(n % word == 0 for n in (q.shape[-1], q.storage_offset(), *q.stride()[:-1])):
        wide = q.view(torch.complex128)
        return torch.cat([wide, wide], dim=-1).view(q.dtype)
    return torch.cat([q, q], dim=-1)


def gpu_multiplies(q: Tensor) -> bool:
    """Whether the device multiplies q in half precision and sums in fp32."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)

"""Compile kernels before the first prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from sparse_prefill.attention import sparse_attention
from sparse_prefill.core.option_checks import check_tokens
from sparse_prefill.core.prompt import Prompt
from sparse_prefill.plan import with_options
from sparse_prefill.strategy import Strategy, as_strategy

Layout = Literal["heads", "tokens"]


def warmup(
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    strategy: Strategy | str = "flex_prefill",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    batches: Sequence[int] = (1,),
    window: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    value_dim: int | None = None,
    layout: tuple[Layout, Layout] = ("heads", "heads"),
) -> None:
    """Compile the kernels of :func:`~sparse_prefill.sparse_attention`, by attention over a few short random prompts.

    Later prompts with the same arguments compile nothing, whatever their lengths, chunks and padding. Call it in the
    same environment as these: under ``torch.inference_mode()`` or not, which are separate kernels, with the same number
    of threads, and inside the same :func:`~sparse_prefill.kernel_options`.

    Args:
        heads (int): query heads Hq.
        kv_heads (int): key heads Hkv.
        head_dim (int): D.
        strategy (Strategy | str): its block size matters and, for a wrapper, additions to the softmax. Default:
            "flex_prefill".
        dtype (torch.dtype): dtype of queries, keys and values. Default: torch.float32.
        device (torch.device | str): where they are. Default: "cpu".
        batches (Sequence[int]): batch sizes. All sizes from 2 on share a kernel. Rows of padded batches and packed
            documents count as a batch of 1. Default: (1,).
        window (bool): whether there are sliding windows. Default: False.
        scale (float | None): factor of the logits. Default: D ** -0.5.
        softcap (float | None): soft cap of the logits; its value doesn't matter. Default: None.
        sinks (bool): whether there are sinks. Default: False.
        value_dim (int | None): head dimension of the values. Default: ``head_dim``.
        layout (tuple[str, str]): memory layout of the queries, and of keys and values: "heads" for [B, H, N, D],
            "tokens" for [B, N, H, D] with dimensions 1 and 2 transposed. It matters on a GPU only. Default: ("heads",
            "heads").

    Raises:
        ValueError: if a number is out of range, or the heads don't fit each other.

    Example:
        >>> with torch.inference_mode():
        ...     warmup(9, 3, 64, dtype=torch.bfloat16)
    """
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim or head_dim}
    for name, size in sizes.items():
        check_tokens(name, size, least=1)
    if not set(layout) <= set(get_args(Layout)) or len(layout) != 2:
        raise ValueError(f"layout must be two of {', '.join(get_args(Layout))}, got {layout!r}.")
    strategy = cast(Strategy, with_options(as_strategy(strategy), min_length=0, max_decode_queries=0))
    block = strategy.block_size
    grid = max(block, 128)
    generator = torch.Generator().manual_seed(0)

    def made(batch: int, of_heads: int, tokens: int, dim: int, order: Layout) -> Tensor:
        shape = (batch, of_heads, tokens, dim) if order == "heads" else (batch, tokens, of_heads, dim)
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return x if order == "heads" else x.transpose(1, 2)

    for batch in batches:
        # On a GPU, whole tiles, ragged tiles and a chunk that is shorter than a tile need separate kernels.
        for q_len, kv_len in ((2 * grid, 2 * grid), (2 * grid + 1, 2 * grid + 1), (17, 3 * grid)):
            q = made(batch, heads, q_len, head_dim, layout[0])
            k = made(batch, kv_heads, kv_len, head_dim, layout[1])
            v = made(batch, kv_heads, kv_len, value_dim or head_dim, layout[1])
            prompt = Prompt(q_len, kv_len, block, window=2 * block if window else None)
            sink_logits = torch.zeros(heads, device=device) if sinks else None
            sparse_attention(q, k, v, strategy, prompt=prompt, scale=scale, softcap=softcap, sinks=sink_logits)

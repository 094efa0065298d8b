"""Options of FlexAttention's GPU kernel: backend, tiles and scheduling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.kernel.block_lists import FLEX_DECODING_QUERIES

ALLOWED = ("BACKEND", "BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "USE_TMA", "PRESCALE_QK")
BACKENDS = ("AUTO", "TRITON", "FLASH")
# Before torch 2.14, blocks smaller than torch's tiles are an error. These tiles divide them and fit the shared memory
# of every GPU from compute capability 8.0 on; they were not tuned. Other cases use torch's choice. By bytes of an
# element and largest head dimension: rows of queries and of keys in a tile.
SMALL_TILES = {(2, 128): (64, 64), (2, 256): (64, 32), (4, 128): (32, 32), (4, 256): (32, 16)}

# Tiles that were faster than torch's choice, by compute capability, for half precision, heads of 65 to 128 and blocks
# of 128 or more. On an H100 with torch 2.11 and 128K tokens, reading by TMA, dense attention takes 12 % less time and
# lists of a tenth of the blocks 11 % less. TMA needs descriptors for each row of blocks: with 32K tokens and lists of a
# sixteenth of the blocks, they take 17 % more time than reading without TMA. For heads of up to 64, torch's tiles were
# the fastest.
TILES = {(9, 0): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}}
TMA_OVER_KEYS = 32768

_given: ContextVar[dict[str, Any]] = ContextVar("sparse_prefill_kernel_options", default={})  # noqa: B039  # never changed


@contextmanager
def kernel_options(**options: Any) -> Iterator[None]:
    """Set options of the GPU kernel for all attention inside the ``with`` block. The CPU kernel has no options.

    Each new set of options compiles a kernel. Torch chooses the options that you leave out, with two exceptions: tiles
    of blocks under 128 before torch 2.14, and, if you set no option but ``BACKEND``, tiles that were measured to be
    faster (compute capability 9.0, half precision, heads of over 64). ``benchmarks/gpu.py`` times some options.

    Args:
        **options: of ``flex_attention(kernel_options=...)``: ``BACKEND`` ("AUTO", "TRITON", or "FLASH" for
            FlashAttention 4, which needs torch 2.14, a Hopper or Blackwell GPU and blocks of 128), ``BLOCK_M`` and
            ``BLOCK_N`` (queries and keys in a tile; they must divide the block size), ``num_warps``, ``num_stages``,
            ``USE_TMA`` and ``PRESCALE_QK``.

    Raises:
        ValueError: if an option isn't one of these; in a call of attention, if the device, the dtype or the block size
            doesn't allow it.

    Example:
        >>> with kernel_options(BLOCK_M=64, BLOCK_N=64, num_warps=4):
        ...     out = sparse_attention(q, k, v, "flex_prefill")
    """
    unknown = sorted(set(options) - set(ALLOWED))
    if unknown:
        raise ValueError(f"Unknown kernel options {', '.join(unknown)}. There are: {', '.join(ALLOWED)}.")
    backend = options.get("BACKEND", "AUTO")
    if backend not in BACKENDS:
        raise ValueError(f"BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend == "FLASH":
        _check_flash_is_installed()
    token = _given.set({**_given.get(), **options})
    try:
        yield
    finally:
        _given.reset(token)


def given_options() -> dict[str, Any]:
    """The options that :func:`kernel_options` sets around this call."""
    return _given.get()


def options_for(q: Tensor, v: Tensor, block_size: int, *, is_plain: bool) -> dict[str, Any]:
    """The ``kernel_options`` for queries q [B, Hq, M, D], values v [B, Hkv, N, Dv] and a block size.

    ``is_plain`` says that the kernel doesn't modify logits. Modifiers need registers, so they don't get larger tiles.

    Raises:
        ValueError: if these inputs don't allow an option that was set.
    """
    given = _given.get()
    backend = given.get("BACKEND", "AUTO")
    if q.device.type != "cuda":
        if backend != "AUTO":
            raise ValueError(f"BACKEND={backend!r} is for CUDA devices, and q is on {q.device}: leave it out.")
        return {}
    if backend == "FLASH":
        _check_flash_allows(q, block_size)
        return dict(given)
    options: dict[str, Any] = {}
    if block_size < 128 and torch.__version__ < "2.14":
        options.update(_small_tiles(q, block_size))
    # Fewer queries may run the FlexDecoding kernel, which has other tiles.
    if is_plain and given.keys() <= {"BACKEND"} and block_size >= 128 and q.shape[2] >= FLEX_DECODING_QUERIES:
        options.update(_tiles(q, v))
    # Lengths are symbolic, so torch can't infer that every tile is whole, and would check each tile against the end.
    grid = max(128, block_size)
    if q.shape[2] % grid == 0 and v.shape[2] % grid == 0:
        options["IS_DIVISIBLE"] = True
    options.update(given)
    for name in ("BLOCK_M", "BLOCK_N"):
        if block_size % options.get(name, 1):
            raise ValueError(f"{name} must divide the block size of {block_size}, got {options[name]}.")
    return options


def _tiles(q: Tensor, v: Tensor) -> dict[str, Any]:
    dim = max(q.shape[3], v.shape[3])
    if q.element_size() != 2 or not 64 < dim <= 128:
        return {}
    tiles = TILES.get(_capability(q.device.index or 0))
    return {**tiles, "USE_TMA": v.shape[2] > TMA_OVER_KEYS} if tiles else {}


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _small_tiles(q: Tensor, block_size: int) -> dict[str, int]:
    for (element_size, head_dim), (rows, columns) in SMALL_TILES.items():
        if q.element_size() == element_size and q.shape[3] <= head_dim:
            return {"BLOCK_M": min(rows, block_size), "BLOCK_N": min(columns, block_size)}
    return {}


def _check_flash_is_installed() -> None:
    if torch.__version__ < "2.14":
        raise ValueError(
            f"BACKEND='FLASH' needs torch 2.14 or newer, and this is {torch.__version__}, whose FLASH backend ignores "
            "block lists under some masks and refuses others: use 'TRITON'."
        )
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        raise ValueError("BACKEND='FLASH' needs the package flash-attn-4, which isn't installed: use 'TRITON'.")


def _check_flash_allows(q: Tensor, block_size: int) -> None:
    major, minor = _capability(q.device.index or 0)
    if major < 9:
        raise ValueError(
            f"BACKEND='FLASH' needs compute capability 9.0, and {q.device} has {major}.{minor}: use 'TRITON'."
        )
    if q.dtype == torch.float32:
        raise ValueError("BACKEND='FLASH' needs bfloat16 or float16, got float32: use 'TRITON'.")
    if block_size != 128:
        raise ValueError(f"BACKEND='FLASH' needs blocks of 128 tokens, got {block_size}: use 'TRITON'.")

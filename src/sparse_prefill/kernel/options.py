"""What FlexAttention's GPU kernel is told: its backend, its tiles and how it is scheduled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from sparse_prefill.kernel.block_lists import SHORT

ALLOWED = ("BACKEND", "BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "USE_TMA", "PRESCALE_QK")
BACKENDS = ("AUTO", "TRITON", "FLASH")
# Before torch 2.14, blocks smaller than the tiles that torch chooses are an error. These divide them, and are small
# enough for the shared memory of any GPU since compute capability 8.0. None is measured: where nothing stands here, the
# choice is torch's. By bytes of an element and largest head dimension: rows of queries and of keys in a tile.
SMALL_TILES = {(2, 128): (64, 64), (2, 256): (64, 32), (4, 128): (32, 32), (4, 256): (32, 16)}

# By compute capability, for half precision, heads of 65 to 128 and blocks of 128 and more: what was faster there
# than torch's choice. On an H100 with torch 2.11, dense attention and lists of a tenth of the blocks take 12 and 11 %
# less time at 128K tokens, read by TMA. Descriptors for that are made by each row of blocks: at 32K tokens and lists of
# a sixteenth, that takes 17 % more time than none. Heads of up to 64 are left to torch, whose tiles were the fastest.
TILES = {(9, 0): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}}
TMA_OVER = 32768  # key tokens

_given: ContextVar[dict[str, Any]] = ContextVar("sparse_prefill_kernel_options", default={})  # noqa: B039  # never changed


@contextmanager
def kernel_options(**options: Any) -> Iterator[None]:
    """Give options to the GPU kernel of all attention inside the ``with`` block; the kernel of CPUs has none.

    Each new set of options compiles a kernel. What isn't given is torch's choice, but for tiles that blocks under 128
    need and, while no option is given, for those that were measured to be faster (compute capability 9.0, half
    precision, heads of over 64). ``benchmarks/gpu.py`` tries some.

    Args:
        **options: of ``flex_attention(kernel_options=...)``: ``BACKEND`` ("AUTO", "TRITON", or "FLASH", i.e.
            FlashAttention 4, which needs torch 2.14, a Hopper or Blackwell GPU and blocks of 128), ``BLOCK_M`` and
            ``BLOCK_N`` (rows of queries and of keys in a tile, which divide the block size), ``num_warps``,
            ``num_stages``, ``USE_TMA`` and ``PRESCALE_QK``.

    Raises:
        ValueError: if an option isn't one of these, or, once attention is called, if the device, the dtype or the
            block size don't allow it.

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
        _check_flash_is_there()
    token = _given.set({**_given.get(), **options})
    try:
        yield
    finally:
        _given.reset(token)


def given_options() -> dict[str, Any]:
    """What :func:`kernel_options` was given, around this call."""
    return _given.get()


def options_for(q: Tensor, v: Tensor, block_size: int, *, is_plain: bool) -> dict[str, Any]:
    """The ``kernel_options`` for queries q [B, Hq, M, D], values v [B, Hkv, N, Dv] and a block size.

    ``is_plain`` tells that nothing is done to logits, for which a kernel needs registers.

    Raises:
        ValueError: if what was given can't be had for them.
    """
    given = _given.get()
    backend = given.get("BACKEND", "AUTO")
    if q.device.type != "cuda":
        if backend != "AUTO":
            raise ValueError(f"BACKEND={backend!r} is for CUDA devices, and q is on {q.device}: leave it out.")
        return {}
    if backend == "FLASH":
        _check_flash_takes(q, block_size)
        return dict(given)
    options: dict[str, Any] = {}
    if block_size < 128 and torch.__version__ < "2.14":
        options.update(_small_tiles(q, block_size))
    # Fewer queries than SHORT may be torch's other kernel's, which has tiles of its own.
    if is_plain and given.keys() <= {"BACKEND"} and block_size >= 128 and q.shape[2] >= SHORT:
        options.update(_tiles(q, v))
    # Of symbolic lengths, torch can't tell itself that no tile reaches beyond them, and would check each.
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
    return {**tiles, "USE_TMA": v.shape[2] > TMA_OVER} if tiles else {}


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _small_tiles(q: Tensor, block_size: int) -> dict[str, int]:
    for (element_size, head_dim), (rows, columns) in SMALL_TILES.items():
        if q.element_size() == element_size and q.shape[3] <= head_dim:
            return {"BLOCK_M": min(rows, block_size), "BLOCK_N": min(columns, block_size)}
    return {}


def _check_flash_is_there() -> None:
    if torch.__version__ < "2.14":
        raise ValueError(
            f"BACKEND='FLASH' needs torch 2.14 or newer, and this is {torch.__version__}, whose FLASH backend attends "
            "densely for some masks and lacks others: take 'TRITON'."
        )
    if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
        raise ValueError("BACKEND='FLASH' needs the package flash-attn-4, which isn't installed: take 'TRITON'.")


def _check_flash_takes(q: Tensor, block_size: int) -> None:
    major, minor = _capability(q.device.index or 0)
    if major < 9:
        raise ValueError(f"BACKEND='FLASH' needs compute capability 9.0, and {q.device} has {major}.{minor}.")
    if q.dtype == torch.float32:
        raise ValueError("BACKEND='FLASH' needs bfloat16 or float16, got float32: take 'TRITON'.")
    if block_size != 128:
        raise ValueError(f"BACKEND='FLASH' needs blocks of 128 tokens, got {block_size}: take 'TRITON'.")

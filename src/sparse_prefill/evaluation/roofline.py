"""The roofline of sparse attention: the least flops and bytes of each stage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sparse_prefill.core.prompt import Prompt
from sparse_prefill.strategy import Strategy

BYTES_PER_INDEX = 4  # of a count or an index in the block lists


@dataclass(frozen=True)
class Work:
    """The work of a stage.

    Args:
        flops (int): flops of matrix products; a multiplication and an addition count as two.
        least_bytes (int): bytes if each used input is read once and each output is written once.
        most_bytes (int | None): bytes if nothing stays in a cache between two reads. Default: unknown.
    """

    flops: int
    least_bytes: int
    most_bytes: int | None = None


def least_work(q: Tensor, k: Tensor, v: Tensor, strategy: Strategy, prompt: Prompt) -> dict[str, Work]:
    """The least work of each stage of one sparse call.

    Flops don't include softmax, sums and comparisons. An estimator's are counted while it runs; a kernel's are those of
    all token pairs in the kept blocks.

    Args:
        q (Tensor): queries [B, Hq, M, D].
        k (Tensor): keys [B, Hkv, N, D].
        v (Tensor): values [B, Hkv, N, Dv].
        strategy (Strategy): the strategy; it runs once, to count what it reads and keeps.
        prompt (Prompt): what the tokens are.

    Returns:
        dict[str, Work]: the work of "estimate", "select", "table" and "kernel".
    """
    estimate, scores = _estimate(q, k, strategy, prompt)
    keep = strategy.keep(q, k, prompt)
    kept = int(keep.sum())
    # A full and a partial list: their counts, and the indices of both.
    lists = BYTES_PER_INDEX * (kept + 2 * keep[..., 0].numel())
    return {
        "estimate": estimate,
        "select": Work(0, _bytes(*_tensors(scores)) + keep.numel()),
        "table": Work(0, keep.numel() + lists),
        "kernel": kernel_work(q, k, v, keep, prompt),
    }


def kernel_work(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, prompt: Prompt) -> Work:
    """The least work of attention over a keep table.

    Args:
        q, k, v, prompt: as for :func:`least_work`.
        keep (Tensor): bool [B or 1, Hq or 1, n_q, n_k].

    Returns:
        Work: 2 (D + Dv) flops for each token pair of a kept block. The least bytes are q, k, v and the output once; the
        most bytes have the keys and values of each kept block once for each query block.
    """
    size = prompt.block_size
    missing = prompt.n_k * size - prompt.kv_len  # slots of the last key block without a token
    keys = keep.sum(-1) * size - keep[..., -1].long() * missing  # [B or 1, Hq or 1, n_q], of each query block
    rows = torch.full((prompt.n_q,), size, device=keep.device)
    rows[-1] -= prompt.n_q * size - prompt.q_len
    heads = q.shape[0] * q.shape[1] // math.prod(keep.shape[:2])  # heads that share a table
    widths = q.shape[3] + v.shape[3]
    queries_and_outputs = q.shape[0] * q.shape[1] * q.shape[2] * widths * q.element_size()
    return Work(
        flops=2 * widths * heads * int((keys * rows).sum()),
        least_bytes=queries_and_outputs + _bytes(k, v),
        most_bytes=queries_and_outputs + heads * int(keys.sum()) * widths * k.element_size(),
    )


def _estimate(q: Tensor, k: Tensor, strategy: Strategy, prompt: Prompt) -> tuple[Work, Any]:
    """The work of scoring, and the scores."""
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}  # which torch doesn't count
    reads = _Reads(q, k)
    # The counters don't see into compiled graphs, so compiled parts run op by op here.
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False, custom_mapping=on_cpu) as flops,
        reads,
    ):
        scores = strategy.score(q, k, prompt)
    return Work(flops.get_total_flops(), reads.bytes()), scores


def _sdpa_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


class _Reads(TorchDispatchMode):
    """Counts the bytes that operations read from some tensors, each element once."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.sizes = {_place(x): x.numel() * x.element_size() for x in tensors}
        self.views: dict[int, set] = {place: set() for place in self.sizes}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        is_view = func.is_view and all(_place(x) in self.views for x in _tensors(out))  # a reshape may be a copy
        if not is_view and not name.startswith("new_") and not name.endswith("_like"):
            for x in (*_tensors(args), *_tensors(kwargs)):
                if _place(x) in self.views:
                    self.views[_place(x)].add((x.storage_offset(), _spans(x), x.element_size()))
        return out

    def bytes(self) -> int:
        """Bytes of distinct views, at most those of the tensors."""
        return sum(
            min(self.sizes[place], sum(size * math.prod(n for n, _ in spans) for _, spans, size in views))
            for place, views in self.views.items()
        )


def _spans(x: Tensor) -> tuple[tuple[int, int], ...]:
    """Sizes and strides of a tensor's dimensions, equal for all views of the same elements in one order."""
    spans: list[tuple[int, int]] = []
    for n, step in zip(x.shape, x.stride(), strict=True):
        if spans and spans[-1][1] == n * step:
            spans[-1] = (spans[-1][0] * n, step)
        elif n > 1 and step:  # expanded dimensions are read once
            spans.append((n, step))
    return tuple(spans)


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(found: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, tuple | list):
        for part in found:
            yield from _tensors(part)
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)

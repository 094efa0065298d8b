"""Tensors that claim to be on a GPU and hold their values on the CPU."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten


class OnGPU(Tensor):
    """A tensor whose device is "cuda" and whose values, ``held``, are on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGPU:
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cuda:0",
        )
        found.held = held
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return on_gpu(func, args, kwargs or {})


class GPU(TorchDispatchMode):
    """Make each new tensor on the device "cuda" an :class:`OnGPU`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        device = (kwargs or {}).get("device")
        made_there = device is not None and torch.device(device).type == "cuda"
        if made_there or any(isinstance(x, OnGPU) for x in tree_leaves((args, kwargs))):
            return on_gpu(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def on_gpu(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU. tests/test_host_syncs.py looks for operations that would wait for a GPU."""
    there = [x for x in tree_leaves((args, kwargs)) if isinstance(x, OnGPU)]
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else torch.device(device).type == "cuda"
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, (args, kwargs))
    if func is aten.bmm.dtype:  # there is none on CPUs
        func, args = aten.bmm.default, (args[0].to(args[2]), args[1].to(args[2]))
    found = func(*args, **kwargs)
    if not goes_there:
        return found
    written = [x for x in there if any(x.held is y for y in tree_leaves(found) if isinstance(y, Tensor))]
    if written and any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
        return written[0]
    return tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, found)


def no_device(stack: ExitStack) -> None:
    """Answer what torch asks the CUDA device in passing, and run SDPA on the CPU."""
    for name, answer in (("_lazy_init", None), ("is_initialized", False), ("get_device_capability", (9, 0))):
        setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    sdpa = F.scaled_dot_product_attention

    def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if not isinstance(q, OnGPU):
            return sdpa(q, k, v, **options)
        here = tree_map(lambda x: x.held if isinstance(x, OnGPU) else x, ((q, k, v), options))
        return OnGPU(sdpa(*here[0], **here[1]))

    F.scaled_dot_product_attention = dense  # type: ignore[assignment]
    stack.callback(setattr, F, "scaled_dot_product_attention", sdpa)

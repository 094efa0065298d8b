"""Attention under ``torch.autocast``: inputs get its dtype, and all steps inside keep theirs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
INPUTS = ("q", "k", "v")


def own_precision(function: Function) -> Function:
    """Make a function of q, k and optionally v independent of ``torch.autocast``, except for the dtype of its inputs.

    Autocast casts the inputs of SDPA to its dtype, so the arguments named q, k and v are cast here. Inside, autocast is
    off, since each step of an estimate chooses its precision.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if given is None or not _is_on(given.device.type):
            return function(*args, **kwargs)
        kind = given.device.type
        bound = signature.bind(*args, **kwargs)
        for name in INPUTS:
            x = bound.arguments.get(name)
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
                bound.arguments[name] = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return function(*bound.args, **bound.kwargs)

    return cast(Function, run)


def _is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

"""Checks of the tensors that users pass in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sparse_prefill.core.prompt import Prompt

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_queries_and_keys(q: Tensor, k: Tensor, key_name: str = "k") -> None:
    """Raise ValueError unless q [B, Hq, M, D] and k [B, Hkv, N, D] can attend to each other."""
    for name, x in (("q", q), (key_name, k)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
    if q.device == k.device:  # else the check of devices below reports it
        _check_has_values(q, k)
    for name, x in (("q", q), (key_name, k)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, heads, tokens, head_dim], got shape {list(x.shape)}: "
                "transpose from [batch, tokens, heads, head_dim] or add the batch."
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}: cast it first.")
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got shape {list(x.shape)}.")
    if q.dtype != k.dtype:
        raise ValueError(f"q and {key_name} must have one dtype, got {q.dtype} and {k.dtype}: cast one of them.")
    if q.device != k.device:
        raise ValueError(f"q and {key_name} must be on one device, got {q.device} and {k.device}: move one of them.")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q and {key_name} must have one batch size, got {q.shape[0]} and {k.shape[0]}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"The number of query heads must be a multiple of the key heads, got {q.shape[1]} and {k.shape[1]}."
        )
    if key_name == "k" and q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head_dim, got {q.shape[3]} and {k.shape[3]}.")
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"q must not have more tokens than {key_name}, got {q.shape[2]} and {k.shape[2]}: queries are the last "
            "tokens of the keys, so pass the keys of the whole prefix along."
        )


def _check_has_values(*tensors: Tensor) -> None:
    """Raise ValueError for tensors without values, for traced calls, and for tensors that aren't plain and dense."""
    if torch.compiler.is_dynamo_compiling():  # a compiled function around the call, whose graph leaves the call out
        return
    modes = dispatch_modes()
    is_fake = any(x.is_meta or isinstance(x, FakeTensor) for x in tensors)
    if is_fake or any(isinstance(mode, FakeTensorMode) for mode in modes):
        raise ValueError(
            "q, k and v must have values, since these decide which blocks are kept, and one is a meta or fake tensor: "
            "make them on a real device, outside of FakeTensorMode and torch.export."
        )
    if torch.jit.is_tracing() or any(isinstance(mode, ProxyTorchDispatchMode) for mode in modes):
        raise ValueError(
            "Sparse attention can't be traced (torch.jit.trace, make_fx, torch.export), as it chooses blocks for each "
            "prompt: call it without tracing."
        )
    is_dual = forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if is_dual or any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise ValueError(
            "Sparse attention supports no transforms (vmap, grad, jvp, functionalize) and no derivatives: give a "
            "batch as the first dimension of q, k and v, and call it outside of transforms."
        )
    for x in tensors:
        if x.is_nested or x.layout != torch.strided or is_traceable_wrapper_subclass(x):
            raise ValueError(
                f"q, k and v must be plain dense tensors, got a {type(x).__name__} of layout {x.layout}: pad nested "
                "ones and give Prompt(right_padding=...), call to_dense() on sparse ones and to_local() on a DTensor."
            )


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v [B, Hkv, N, Dv] make one attention call without gradients."""
    check_queries_and_keys(q, k)
    check_queries_and_keys(q, v, "v")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k and v must agree in batch, heads and tokens, got shapes {list(k.shape)} and {list(v.shape)}."
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError(
            "sparse_attention has no backward: call it under torch.no_grad() or torch.inference_mode(), or detach "
            "q, k and v."
        )


def check_prompt(prompt: Prompt, q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless a prompt describes q [B, Hq, M, D] and k [B, Hkv, N, D]."""
    if (prompt.q_len, prompt.kv_len) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"The prompt has q_len={prompt.q_len} and kv_len={prompt.kv_len}, but q has {q.shape[2]} tokens and "
            f"k has {k.shape[2]}: build the Prompt for these tensors."
        )
    if prompt.batch not in (1, q.shape[0]):
        raise ValueError(f"The prompt describes a batch of {prompt.batch}, but q has a batch of {q.shape[0]}.")


def check_one_document(name: str, why: str, prompt: Prompt) -> None:
    """Raise ValueError if a prompt has packed documents, since ``name`` can't make one table for them."""
    if prompt.documents is not None:
        raise ValueError(
            f"{name} cannot make one table for packed documents: {why}. Select for each of "
            "prompt.split_sequences(), as sparse_attention does."
        )

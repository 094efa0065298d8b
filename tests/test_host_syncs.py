"""The host never waits for the device during a call: no value is read from it or copied to it."""

from __future__ import annotations

import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_prefill as sp
from sparse_prefill.core import tensor_checks
from sparse_prefill.kernel import flex

PROMPTS = {"whole": (4096, 4096), "ragged chunk": (1000, 4001)}  # tokens of queries and of keys


class HostSyncs(TorchDispatchMode):
    """Records operations that mix tensors of the CPU and of the device: copies, for which the host waits.

    On the device "meta", tensors have no values, so reading one raises an error.
    """

    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if func not in self.COPIES:  # other operations pass a CPU scalar as a kernel argument
            tensors = [x for x in tensors if x.ndim or x.device.type != "cpu"]
        if len({x.device.type for x in tensors}) > 1:
            self.found.append(func)
        return out


@pytest.fixture
def syncs(monkeypatch):
    """Synchronizations of calls on the device "meta", with an attention kernel that computes nothing."""
    seen = HostSyncs()

    def copied_from_the_host(make):
        def checked(*args, device=None, **kwargs):
            if device is not None and torch.device(device).type != "cpu":
                seen.found.append(make)
            return make(*args, device=device, **kwargs)

        return checked

    def attend(q, k, v, *others):
        assert {x.device.type for x in tree_leaves(others) if isinstance(x, torch.Tensor)} == {"meta"}
        return q.new_empty(*q.shape[:3], v.shape[3])

    for name in ("tensor", "as_tensor"):  # dispatch modes can't see these copies
        monkeypatch.setattr(torch, name, copied_from_the_host(getattr(torch, name)))
    monkeypatch.setattr(tensor_checks, "_check_has_values", lambda *tensors: None)
    for name in ("compiled", "compiled_with_modifiers"):
        monkeypatch.setattr(flex, name, lambda: attend)
    return seen


def on_meta(q_len, kv_len):
    q, k = (torch.empty(1, heads, tokens, 64, device="meta") for heads, tokens in ((4, q_len), (2, kv_len)))
    return q, k, k


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.to("meta"),
        lambda x: torch.tensor([1.0], device="meta"),
        lambda x: x.to("meta")[torch.tensor([0])],
        lambda x: torch.empty(3, device="meta").copy_(x),
    ],
)
def test_copies_to_the_device_are_recorded(syncs, sync):
    with syncs:
        sync(torch.ones(3))
    assert syncs.found


@pytest.mark.parametrize("sync", [torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.nonzero, lambda x: x[x > 0]])
def test_reading_a_value_raises(sync):
    with pytest.raises((RuntimeError, NotImplementedError)):
        sync(torch.ones(1, device="meta"))


@pytest.mark.parametrize("lengths", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("name", sp.list_strategies())
def test_no_strategy_waits_for_the_device(name, lengths, syncs):
    strategy = sp.get_strategy(name, min_length=0)
    with syncs:
        assert sp.sparse_attention(*on_meta(*lengths), strategy).shape == (1, 4, lengths[0], 64)
    assert not syncs.found


@pytest.mark.parametrize("lengths", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("name", [name for name in sp.list_wrappers() if name != "layer_schedule"])
def test_no_wrapper_waits_for_the_device(name, lengths, syncs):
    of = {"name": "mean_pool", "min_length": 0}
    strategy = sp.get_strategy(name, of=of, **({"heads": {1: "a_shape"}} if name == "by_head" else {}))
    with syncs:
        sp.sparse_attention(*on_meta(*lengths), strategy)
    assert not syncs.found


def test_a_soft_cap_sinks_and_a_window_do_not_wait_for_the_device(syncs):
    sinks = torch.empty(4, device="meta")
    with syncs:
        prompt = sp.Prompt(4096, window=3000)
        sp.sparse_attention(*on_meta(4096, 4096), "mean_pool", prompt=prompt, softcap=30.0, sinks=sinks)
    assert not syncs.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sp.list_strategies())
def test_no_strategy_waits_for_a_gpu(name):
    q, k, v = (x.cuda().bfloat16() for x in reference.random_qkv(heads=4, kv_heads=2, q_len=4000, dim=64))
    strategy = sp.get_strategy(name, min_length=0)
    want = sp.sparse_attention(q, k, v, strategy)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sp.sparse_attention(q, k, v, strategy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_replays_attention_with_new_values():
    q, k, v = (x.cuda().bfloat16() for x in reference.random_qkv(heads=4, kv_heads=2, q_len=4096, dim=64, scale=4))
    others = [
        x.cuda().bfloat16() for x in reference.random_qkv(heads=4, kv_heads=2, q_len=4096, dim=64, seed=1, scale=4)
    ]
    strategy, prompt = sp.get_strategy("flash_prefill", min_length=0), sp.Prompt(4096)
    with torch.inference_mode():
        want = sp.sparse_attention(*others, strategy, prompt=prompt)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                sp.sparse_attention(q, k, v, strategy, prompt=prompt)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = sp.sparse_attention(q, k, v, strategy, prompt=prompt)
        for x, other in zip((q, k, v), others, strict=True):
            x.copy_(other)
        graph.replay()
    assert torch.equal(out, want)

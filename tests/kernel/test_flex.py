"""The inputs of the GPU's kernel, as far as they can be tested without a GPU."""

from __future__ import annotations

import pytest
import torch
from test_strategies import small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparse_prefill as sp
from sparse_prefill.core import tensor_checks
from sparse_prefill.kernel import block_sparse, flex

TOKENS = 1000
LAYOUTS = {  # memory layouts of x [B, H, N, D]
    "heads": lambda x: x.contiguous(),
    "tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens of a wider projection": lambda x: (
        torch.cat([x, x], 3).transpose(1, 2).contiguous()[..., 64:].transpose(1, 2)
    ),
    "longer cache": lambda x: torch.cat([x, x], 2)[:, :, :TOKENS],
    "one of two layers": lambda x: torch.stack([x, x])[1],
    "broadcast": lambda x: x[:, :1].expand(x.shape),
}


@pytest.fixture
def handed(monkeypatch):
    """The tensors and flags of each kernel call. The kernel computes nothing."""
    calls = []

    def attend(q, k, v, is_bnhd, *others):
        calls.append(((q, k, v), is_bnhd))
        return torch.empty_like(flex.heads_first((q, k, v), is_bnhd)[0])

    monkeypatch.setattr(tensor_checks, "_check_has_values", lambda *tensors: None)
    for name in ("compiled", "compiled_with_modifiers"):
        monkeypatch.setattr(flex, name, lambda: attend)
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_kernel_gets_contiguous_tensors_and_flags_of_their_layouts(layout, softcap, handed):
    q, k = (torch.empty(1, heads, TOKENS, 64, device="meta") for heads in (4, 2))
    x, y = LAYOUTS[layout](q), LAYOUTS[layout](k)
    sp.sparse_attention(x, y, y, small("a_shape"), softcap=softcap)
    ((tensors, is_bnhd),) = handed
    assert is_bnhd == (layout == "tokens",) * 3
    assert all(x.is_contiguous() and x.storage_offset() == 0 for x in tensors)
    assert [x.shape for x in flex.heads_first(tensors, is_bnhd)] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("name", ["xattention", "flex_prefill"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_part_of_a_long_prompt_is_contiguous(layout, name, handed, monkeypatch):
    strategy = small(name, 64)
    monkeypatch.setattr(block_sparse, "MAX_TABLE_ENTRIES", 4 * strategy.block_size)
    q, k = (torch.empty(1, heads, TOKENS, 64, device="meta") for heads in (4, 2))
    x, y = LAYOUTS[layout](q), LAYOUTS[layout](k)
    sp.sparse_attention(x, y, y, strategy)
    assert len(handed) > 1
    assert all(x.is_contiguous() and x.storage_offset() == 0 for tensors, _ in handed for x in tensors)


def test_tokens_before_heads_are_copied_if_a_tensor_has_too_many_elements_for_32_bits():
    few, many = (torch.empty(1, tokens, 32, 128, device="meta").transpose(1, 2) for tokens in (2**19 - 1, 2**19))
    assert flex._to_kernel_layout(few)[1]
    found, is_bnhd = flex._to_kernel_layout(many)
    assert not is_bnhd
    assert found.is_contiguous()


def test_the_kernel_layout_keeps_the_values_of_any_layout():
    k = torch.randn(1, 2, TOKENS, 64)
    for make in LAYOUTS.values():
        x = make(k)
        found, is_bnhd = flex._to_kernel_layout(x)
        assert not is_bnhd
        assert torch.equal(found, x)
        assert found.is_contiguous()


class Divisions(TorchDispatchMode):
    """Records divisions of integers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if any(word in func.__name__ for word in ("div", "remainder", "fmod")) and not tensors[0].is_floating_point():
            self.found.append(func)
        return func(*args, **(kwargs or {}))


def test_no_token_level_rule_divides_integers(monkeypatch):
    """Torch 2.11 to 2.14 can't lower a division by a symbolic block size for a GPU."""
    seen = Divisions()

    def flex_attention(q, k, v, *, score_mod, block_mask, **others):
        b, h, rows, keys = torch.meshgrid(*(torch.arange(n) for n in (1, 4, q.shape[2], k.shape[2])), indexing="ij")
        with seen:
            block_mask.mask_mod(b, h, rows, keys)
            score_mod(torch.zeros(b.shape), b, h, rows, keys)
        return torch.zeros_like(q)

    monkeypatch.setattr(flex, "flex_attention", flex_attention)
    monkeypatch.setattr(flex, "compiled_with_modifiers", lambda: flex.attention_with_modifiers)
    q, k = torch.randn(1, 4, 100, 64), torch.randn(1, 2, 100, 64)
    prompt = sp.Prompt(100, block_size=16, window=40)
    strategy = sp.get_strategy("mean_correction", of={"name": "mean_pool", "min_length": 0, "block_size": 16})
    sp.sparse_attention(q, k, k, strategy, prompt=prompt, softcap=20.0, sinks=torch.zeros(4))
    assert seen.found == []
    with seen:
        torch.arange(3) // 2
    assert seen.found

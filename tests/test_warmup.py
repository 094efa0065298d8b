"""After warmup, prompts compile no kernels."""

from __future__ import annotations

import pytest
import reference
import torch
from torch._dynamo.utils import counters

import sparse_prefill as sp
from sparse_prefill.kernel import flex

SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 16}
MEANS = sp.get_strategy("mean_pool", block_size=16, share=0.5, min_length=0)
A_SHAPE = sp.get_strategy("a_shape", block_size=16, sink=16, local=32, min_length=0)
DENSE = sp.get_strategy("dense", block_size=16)
PROMPTS = {
    "odd": sp.Prompt(333, block_size=16),
    "whole blocks": sp.Prompt(320, block_size=16),
    "long": sp.Prompt(5001, block_size=16),
    "chunk": sp.Prompt(100, 207, 16),
    "chunk of one block": sp.Prompt(9, 207, 16),
    "padding": sp.Prompt(150, block_size=16, left_padding=[37, 0]),
    "padding on both sides": sp.Prompt(150, block_size=16, left_padding=[37, 0], right_padding=[0, 60]),
    "documents": sp.Prompt(190, block_size=16, documents=[0] * 70 + [1] * 20 + [2] * 100),
}


@pytest.fixture
def graphs(monkeypatch):
    """A function that counts graphs traced since its last call. Kernels are neither compiled nor run."""

    def zeros(*inputs):
        floats = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == 4]
        (q,) = (x for x in floats if x.shape[1] == SIZES["heads"])
        return (torch.zeros(q.shape),)

    monkeypatch.setattr(flex, "compile_flex", lambda graph, inputs: zeros)
    flex.compiled.cache_clear()
    flex.compiled_with_modifiers.cache_clear()
    seen = counters["stats"]["unique_graphs"]

    def count():
        nonlocal seen
        before, seen = seen, counters["stats"]["unique_graphs"]
        return seen - before

    yield count
    flex.compiled.cache_clear()
    flex.compiled_with_modifiers.cache_clear()


def attend(prompt, strategy=MEANS, batch=None, layout=("heads", "heads"), **logits):
    sizes = {"q_len": prompt.q_len, "kv_len": prompt.kv_len, "batch": batch or prompt.batch}
    q, k, v = reference.random_qkv(heads=4, kv_heads=2, **sizes)
    q, k, v = (
        x if order == "heads" else x.transpose(1, 2).contiguous().transpose(1, 2)
        for x, order in zip((q, k, v), (layout[0], layout[1], layout[1]), strict=True)
    )
    return sp.sparse_attention(q, k, v, strategy, prompt=prompt, **logits)


def test_prompts_of_all_kinds_share_one_kernel_that_warmup_compiles(graphs):
    sp.warmup(**SIZES, strategy=MEANS)
    assert graphs() == 1
    for prompt in PROMPTS.values():
        for strategy in (MEANS, A_SHAPE, DENSE):
            attend(prompt, strategy)
    with torch.no_grad():
        attend(PROMPTS["odd"], scale=0.25)  # the default
    assert graphs() == 0
    attend(PROMPTS["odd"], scale=0.3)
    assert graphs() == 1, "another scale needs another kernel"


def test_warmup_compiles_the_given_windows_sinks_caps_and_batches(graphs):
    logits = {"softcap": 20.0, "sinks": torch.zeros(4)}
    sp.warmup(**SIZES, strategy=MEANS, window=True, softcap=30.0, sinks=True)
    sp.warmup(**SIZES, strategy=MEANS, batches=(2,))
    assert graphs() == 2
    for tokens in (100, 2001, 6000):
        attend(sp.Prompt(tokens, block_size=16, window=64), **logits)
    for batch in (2, 3):
        attend(PROMPTS["odd"], batch=batch)
        attend(PROMPTS["chunk"], A_SHAPE, batch=batch)
    assert graphs() == 0
    attend(PROMPTS["odd"], **logits)
    assert graphs() == 1, "a kernel without a window is separate"


def test_layouts_share_a_kernel_on_a_cpu_and_wrappers_have_separate_ones(graphs):
    sp.warmup(**SIZES, strategy=MEANS)
    for layout in (("tokens", "tokens"), ("tokens", "heads")):
        sp.warmup(**SIZES, strategy=MEANS, layout=layout)
        attend(PROMPTS["odd"], layout=layout)
    assert graphs() == 1
    means = sp.get_strategy("mean_correction", of=MEANS)
    sp.warmup(**SIZES, strategy=means)
    assert graphs() == 1
    attend(PROMPTS["odd"], means)
    attend(PROMPTS["chunk"], means)
    assert graphs() == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 0}, "heads must be"),
        ({"kv_heads": 3}, "multiple of the key heads"),
        ({"layout": ("heads", "rows")}, "layout must be two of heads, tokens"),
        ({"dtype": torch.int32}, "must be float32"),
        ({"softcap": -1.0}, "softcap must be"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        sp.warmup(**{**SIZES, **wrong}, strategy=wrong.get("strategy", MEANS))

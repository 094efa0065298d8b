"""Functions that are compiled on a GPU: equal results compiled or not, and one graph for all lengths."""

from __future__ import annotations

from importlib import import_module

import pytest
import reference
import torch
from torch.utils._pytree import tree_leaves

from sparse_prefill.core.fused import block_sums, compile_on_gpu
from sparse_prefill.estimators import pooled

STEPS = {  # shapes of logits (rows, columns) and number arguments
    "proxy_heads._highest_probability": ([(32, 64), (30, 50), (40, 300)], [(16,), (8,)]),
}


def step(name):
    module, _, function = name.partition(".")
    return getattr(import_module(f"sparse_prefill.estimators.{module}"), function)


def logits(rows, columns):
    x = 20 * torch.randn(2, 4, rows, columns, generator=torch.Generator().manual_seed(columns))
    x[..., columns - 3 :] = -torch.inf
    x[:, 1, : rows // 2] = -torch.inf  # queries that see no key
    return x


@pytest.mark.parametrize("name", STEPS)
def test_compiled_steps_equal_eager_ones_and_do_not_change_their_argument(name):
    shapes, numbers = STEPS[name]
    compiled = torch.compile(step(name).__wrapped__, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in shapes:
        for given in numbers:
            x = logits(*shape)
            want = step(name)(x.clone(), *given)
            before = x.clone()
            with torch._dynamo.config.patch(recompile_limit=64):
                found = compiled(x, *given)
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)
            assert torch.equal(x, before)
            assert found.isfinite().all()


def test_on_a_gpu_a_function_is_compiled_once_for_all_sizes_and_once_for_each_number(monkeypatch):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend=compiler, **options))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    @compile_on_gpu
    def sums(x, size, scale):
        return (x * scale).unflatten(-1, (-1, size)).sum(-1)

    for columns in (64, 128, 4096, 4096 + 32):
        for rows in (3, 128, 4):
            x = torch.randn(1, 4, rows, columns)
            torch.testing.assert_close(sums(x, 16, 0.5), x.unflatten(-1, (-1, 16)).sum(-1) / 2)
    assert len(graphs) == 1
    sums(torch.randn(1, 4, 3, 64), 32, 0.5)
    assert len(graphs) == 2, "each number is compiled in"


def values(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def estimates(m, n):
    return values(1, 4, m, n), values(1, 4, 1, n), values(2, 4, m, n)[:1], values(1, 1, m, n) < 0.5


SIZED = {  # arguments of steps of tables, by numbers of rows and columns
    "kernel.block_lists._in_lines_of_16": lambda m, n: (values(m, n) < 0.3,),
    "kernel.block_lists._rows_listed": lambda m, n: (values(m, n) < 0.3, torch.arange(m * n).view(m, n)),
    "estimators.pooled.softmax_among": lambda m, n: (values(1, 4, m, n), values(1, 1, m, n) < 0.3, 0.5),
    "estimators.representative._spread": lambda m, n: (values(1, 4, n) < 0.5, torch.arange(m) % n),
    "estimators.spectral_bands._band": lambda m, n: (values(1, 4, m, n), values(n) < 0.5),
    "strategies.mean_slash._weights": lambda m, n: (*estimates(m, n), values(2, 4, m, n)[1:]),
    "strategies.mean_slash._mixture": lambda m, n: (*estimates(m, n), values(6, 1, 4, 1, 1)),
    "strategies.flex_prefill.jensen_shannon_distance": lambda m, n: (values(2, m, n), values(2, m, n)),
    "selectors.cutoff.reaching": lambda m, n: (values(2, 4, m, n), torch.full((1,), 0.7), None, 1, False),
    "selectors.cutoff.reaching ": lambda m, n: (values(2, 4, m, n), torch.full((1, 1), 0.7), None, 2, True),
}


@pytest.mark.parametrize("name", SIZED)
def test_steps_of_tables_are_compiled_once_for_all_sizes(name):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module, _, function = name.strip().rpartition(".")
    step = getattr(import_module(f"sparse_prefill.{module}"), function)
    compiled = torch.compile(step.__wrapped__, fullgraph=True, dynamic=True, backend=compiler)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for rows, columns in ((6, 40), (96, 16), (9, 2), (40, 33)):
            given = SIZED[name](rows, columns)
            found, want = tree_leaves(compiled(*given)), tree_leaves(step(*given))
            for a, b in zip(found, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("columns", [1, 16, 33, 160])
def test_block_sums_are_those_of_each_block(columns):
    x = torch.randn(2, 3, columns)
    want = torch.stack([x[..., i : i + 16].sum(-1) for i in range(0, columns, 16)], dim=-1)
    torch.testing.assert_close(block_sums(x, 16), want)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 2.0**-16), (torch.float16, 2.0**-21)])
def test_products_with_means_in_half_precision_are_as_exact_as_in_fp32(dtype, rounding, monkeypatch):
    q, k, _ = reference.random_qkv(heads=4, kv_heads=2, q_len=40, scale=8)
    q, means = q.to(dtype), k.double()
    want = pooled.group_product(q.double(), means)
    bound = rounding * pooled.group_product(q.double().abs(), means.abs())
    monkeypatch.setattr(pooled, "gpu_multiplies", lambda q: q.dtype == dtype)
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: bmm(a.to(out_dtype), b.to(out_dtype)))
    found = pooled.mean_logits(q, means.float())
    assert found.dtype == torch.float32
    assert ((found - want).abs() <= bound).all()
    coarse = pooled.group_product(q.double(), means.to(dtype).double())
    assert not ((coarse - want).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(7, 64), (7, 70), (40, 300), (1, 33)])
def test_masses_of_blocks_with_separate_peaks_equal_those_of_one_softmax(shape, monkeypatch):
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x, mass = logits(*shape), step("block_shares.block_shares")
    want = [mass(x.clone(), *given) for given in ((16, 0.3), (32, 1.0))]
    step_of = import_module("sparse_prefill.estimators.block_shares")
    for name in ("_peaks_and_sums", "_shares"):  # as compile_on_gpu compiles them, without its cache
        one_graph = torch.compile(getattr(step_of, name).__wrapped__, fullgraph=True, dynamic=True, backend=compiler)
        monkeypatch.setattr(step_of, name, one_graph)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    for given, expected in zip(((16, 0.3), (32, 1.0)), want, strict=True):
        before = x.clone()
        found = mass(x, *given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        assert found.isfinite().all()
        assert torch.equal(x, before)
    assert graphs, "nothing was compiled"

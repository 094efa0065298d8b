"""Sparse attention runs compiled or raises an error, and a call after an error works."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from threading import Barrier, Thread
from types import SimpleNamespace

import pytest
import reference
import torch
from tiny_gguf import write_gguf
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import sparse_prefill as sp
from sparse_prefill.core.logits import Logits
from sparse_prefill.kernel import compiled, cpu_compile, flex
from sparse_prefill.kernel.block_lists import block_tables
from sparse_prefill.kernel.compiled import Compiled

STRATEGY = sp.get_strategy("a_shape", block_size=16, min_length=0, sink=16, local=16)
QKV = reference.random_qkv(q_len=100)
# For tests that set environment variables or need the first call of a process.
SETUP = """
import torch
import reference, sparse_prefill as sp
q, k, v = reference.random_qkv(q_len=100)
strategy = sp.get_strategy("a_shape", block_size=16, min_length=0, sink=16, local=16)
def attend():
    return sp.sparse_attention(q, k, v, strategy)
def is_sparse():
    keep = strategy.keep(q, k)
    want = reference.sparse_attention(q, k, v, keep, sp.Prompt(100, block_size=16))
    return torch.allclose(attend().double(), want, atol=1e-5)
"""


def in_new_process(code, **environment):
    """The output of a new process."""
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True, env=environment)
    return done.stdout + done.stderr


def attend():
    return sp.sparse_attention(*QKV, STRATEGY)


@pytest.fixture(scope="module")
def expected():
    keep = STRATEGY.keep(*QKV[:2])
    return reference.sparse_attention(*QKV, keep, sp.Prompt(100, block_size=16)).float()


@pytest.fixture
def fresh():
    """Start with nothing compiled, and drop what the test compiles."""
    for one in (flex.compiled, flex.compiled_with_modifiers):
        one.cache_clear()
    yield
    for one in (flex.compiled, flex.compiled_with_modifiers):
        one.cache_clear()


def is_sparse(expected):
    return torch.allclose(attend(), expected, atol=1e-5)


@pytest.mark.parametrize("is_compiled_before", [True, False])
@pytest.mark.parametrize("stance", ["force_eager", "eager_then_compile", "aot_eager_then_compile"])
def test_stances_that_run_eagerly_are_an_error(stance, is_compiled_before, expected, fresh):
    if is_compiled_before:
        attend()
    with torch.compiler.set_stance(stance), pytest.raises(RuntimeError, match=r"switched off.*set_stance"):
        attend()
    assert is_sparse(expected)


@pytest.mark.parametrize("stance", ["eager_on_recompile", "fail_on_recompile"])
def test_stances_that_forbid_compiling_run_only_compiled_kernels(stance, expected, fresh):
    with torch.compiler.set_stance(stance), pytest.raises(RuntimeError):
        attend()
    assert is_sparse(expected)
    with torch.compiler.set_stance(stance):
        assert is_sparse(expected)
        longer = reference.random_qkv(q_len=100, heads=4, dim=32)
        with pytest.raises(RuntimeError):
            sp.sparse_attention(*longer, STRATEGY)
        assert is_sparse(expected)


def test_another_backend_and_a_disabled_compiler_are_errors(expected):
    with torch.compiler.set_stance("default", force_backend="eager"), pytest.raises(RuntimeError, match="switched off"):
        attend()
    with torch._dynamo.config.patch(disable=True), pytest.raises(RuntimeError, match="switched off"):
        attend()
    with torch._dynamo.config.patch(suppress_errors=True):
        assert is_sparse(expected)


@pytest.mark.parametrize("name", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_environment_variables_that_disable_the_compiler_are_an_error(name):
    assert "RuntimeError: torch.compile is switched off." in in_new_process("attend()", **{name: "1"})


def test_the_command_line_reports_a_disabled_compiler_in_one_line(tmp_path):
    model, text = write_gguf(tmp_path / "tiny.gguf", fields={"llama.context_length": 4096}), tmp_path / "text.txt"
    text.write_text("The keeper of the light writes down the wind and the waves each night. " * 60)
    words = [
        "eval",
        "-m",
        str(model),
        "--text",
        str(text),
        "--tokens",
        "450",
        "-s",
        "a_shape:block_size=16,min_length=0",
    ]
    words += ["-o", str(tmp_path / "report.json")]
    said = in_new_process(f"from sparse_prefill.cli import main; print('code', main({words}))", TORCHDYNAMO_DISABLE="1")
    assert "code 1\n" in said
    assert said.splitlines()[-1].startswith("sparse-prefill: RuntimeError: torch.compile is switched off.")
    assert not any(line.startswith("a_shape") for line in said.splitlines()), "no row of numbers"


def test_a_call_that_runs_no_kernel_is_an_error_whatever_the_cause(monkeypatch):
    add_one = Compiled(lambda x: x + 1, lambda graph, inputs: graph.forward)
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: function(*args))
    with pytest.raises(RuntimeError, match="The attention kernel didn't run"):
        add_one(torch.ones(3))


class WithoutPrivateParts:
    """Torch as a release would be that lacks its private parts."""

    _dynamo = SimpleNamespace(eval_frame=SimpleNamespace(), config=torch._dynamo.config)
    utils = SimpleNamespace(_python_dispatch=SimpleNamespace())
    overrides = SimpleNamespace()

    def __getattr__(self, name):
        return getattr(torch, name)


def test_without_private_parts_of_torch_the_count_of_runs_is_still_a_proof(monkeypatch, expected, fresh):
    monkeypatch.setattr(compiled, "torch", WithoutPrivateParts())
    assert is_sparse(expected)
    assert compiled._stance() == "default"
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="kernel didn't run"):
        attend()
    assert is_sparse(expected)


def test_a_failed_build_raises_and_the_next_call_compiles(monkeypatch, expected, fresh):
    def fails(graph, inputs):
        raise TypeError("no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(flex, "compile_flex", fails)
        for suppress in (False, True):
            with torch._dynamo.config.patch(suppress_errors=suppress), pytest.raises(Exception, match="no compiler"):
                attend()
        flex.compiled()._backend = cpu_compile.compile_flex
    assert is_sparse(expected)


def test_a_kernel_that_fails_at_run_time_is_not_compiled_again(monkeypatch):
    built, fails = [], [True]

    def backend(graph, inputs):
        built.append(graph)

        def run(*args):
            if fails[0]:
                raise MemoryError("of the kernel")
            return graph.forward(*args)

        return run

    add_one = Compiled(lambda x: x + 1, backend)
    with pytest.raises(MemoryError, match="of the kernel"):
        add_one(torch.ones(3))
    fails[0] = False
    assert torch.equal(add_one(torch.ones(3)), torch.full((3,), 2.0))
    assert len(built) == 1


def test_a_flop_counter_around_the_first_call_of_a_process_does_not_change_later_calls():
    code = """
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    attend()
print(counter.get_total_flops() > 0, is_sparse())
"""
    assert in_new_process(code).splitlines()[-1] == "True True"


def test_flops_count_the_computed_blocks():
    q, k, v = reference.random_qkv(q_len=160)
    prompt, counts = sp.Prompt(160, block_size=16), []
    keep = prompt.visible().expand(1, 6, -1, -1)
    for table in (keep, keep & (prompt.diagonal() | (torch.arange(10) == 0))):
        with FlopCounterMode(display=False) as counter:
            sp.block_sparse_attention(q, k, v, table, prompt=prompt)
        counts.append(counter.get_flop_counts()["Global"]["sparse_prefill.attend"])
        assert counts[-1] == 4 * int(table.sum()) * 16 * 16 * 16
    assert counts[1] < counts[0] / 2


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode",
    [
        Functions,
        torch.profiler.profile,
        torch.inference_mode,
        lambda: torch.device("cpu"),
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=False),
    ],
    ids=["functions", "profiler", "inference mode", "cpu", "meta", "autocast"],
)
def test_modes_around_a_call_do_not_change_the_output(mode, expected):
    with mode():
        assert is_sparse(expected)
    assert is_sparse(expected)


def test_settings_of_the_process_do_not_change_the_output(expected):
    try:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_default_device("meta")
        out = attend()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_default_device(None)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_an_error_names_another_dispatch_mode(expected):
    with Dispatch(), pytest.raises(RuntimeError, match=r"dispatch mode Dispatch.*outside of the mode"):
        attend()
    assert is_sparse(expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_a_compiled_function_a_call_runs_its_own_kernel(backend, expected):
    prompt, keep = sp.Prompt(100, block_size=16), STRATEGY.keep(*QKV[:2])
    assert torch.allclose(torch.compile(lambda: attend() + 0, backend=backend)(), expected, atol=1e-5)
    with_table = torch.compile(lambda *qkv: 2 * sp.block_sparse_attention(*qkv, keep, prompt=prompt), backend=backend)
    assert torch.allclose(with_table(*QKV), 2 * expected, atol=1e-5)
    inputs = sp.AttentionInputs(q=QKV[0], k=QKV[1], v=QKV[2], prompt=prompt)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="without fullgraph=True"):
        torch.compile(lambda: flex.attend(inputs, block_tables(keep, prompt)), fullgraph=True)()


def test_two_threads_can_make_the_first_call_at_once(expected, fresh):
    barrier, found = Barrier(2), []

    def run():
        barrier.wait()
        found.append(is_sparse(expected))

    threads = [Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True, True]


def test_tables_segments_and_logits_can_be_pickled():
    prompt = sp.Prompt(100, block_size=16)
    tables = block_tables(prompt.visible(), prompt)
    assert all(torch.equal(*pair) for pair in zip(tables, pickle.loads(pickle.dumps(tables)), strict=True))
    segment = sp.Segment(k=QKV[1], v=QKV[2], keep=prompt.visible(), bias=0.5)
    assert torch.equal(pickle.loads(pickle.dumps(segment)).k, segment.k)
    assert pickle.loads(pickle.dumps(Logits(scale=0.5, sinks=torch.ones(6)))).scale == 0.5

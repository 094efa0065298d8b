"""Analysis of compiled kernels without a GPU. Compiling them needs a CUDA build of torch, so it isn't tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "no_gpu"
PTX = """
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r3;
    @%p2 cp.async.ca.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 4;
    ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_last.b32 { %r5 }, [ %rd1 + 0 ];
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.L1::evict_last.L2::cache_hint.b32 { %r5 }, [ %rd1 + 0 ], %rd9;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
    st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
"""


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import pretend

    return pretend


def test_instructions_are_counted_by_kind_and_width(pretend):
    counts = pretend.count(PTX)
    want = {
        "cp.async 16": 1,
        "cp.async 4": 1,
        "ld.global 2": 1,
        "ld.global 4": 2,
        "ld.global 16": 1,
        "cp.async.bulk.tensor": 0,
        "wgmma": 1,
        "mma": 1,
    }
    assert counts == want
    kernel = pretend.Kernel("k", 8, 1024, 255, 0, counts)
    assert (kernel.wide_copies, kernel.narrow_loads, kernel.products) == (1, 1, 2)
    assert not kernel.takes_tensors
    tensors = pretend.count("cp.async.bulk.tensor.2d.shared::cta.global [a], [b];")
    assert pretend.Kernel("k", 8, 1024, 255, 0, tensors).takes_tensors


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has CUDA")
@pytest.mark.parametrize("script", ["kernels.py", "interpret.py"])
def test_scripts_without_a_cuda_build_say_what_is_missing(script):
    process = subprocess.run([sys.executable, FOLDER / script], capture_output=True, text=True)
    assert process.returncode == 1
    assert "needs a CUDA build" in process.stderr

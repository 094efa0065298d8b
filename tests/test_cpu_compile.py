"""The CPU kernel is compiled with square tiles, and nobody else's is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from torch._inductor.cpu_vec_isa import pick_vec_isa

SCRIPT = """
import pathlib, sys, torch
import sparse_prefill as sp
q = torch.randn(1, 2, 100, 16)
strategy = sp.get_strategy("a_shape", block_size=16, sink=16, local=16, min_length=0)
sp.sparse_attention(q, q, q, strategy)
import torch._inductor.codegen.cpp_micro_gemm as gemm
print(gemm.CppMicroGemmFP32Vec.__name__)
code = "".join(path.read_text() for path in pathlib.Path(sys.argv[1]).rglob("*.cpp"))
print([rows for rows in (1, 8, 16) if f"m += {rows})" in code])
"""


@pytest.mark.skipif(pick_vec_isa().nelements() not in (8, 16), reason="neither AVX2 nor AVX-512")
def test_tiles_are_square_in_this_kernel_alone(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, check=True, capture_output=True, text=True
    )
    left_as_it_was, rows = found.stdout.splitlines()
    assert left_as_it_was == "CppMicroGemmFP32Vec"
    assert rows == "[1, 8]"  # of products with keys, and of those with values in half precision

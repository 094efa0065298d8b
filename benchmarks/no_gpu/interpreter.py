"""Run compiled functions without a GPU: another process compiles them, and Triton's interpreter runs their kernels.

These are two processes since Triton has to be told to interpret before it is imported, and then can't compile.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch
from on_gpu import OnGPU
from torch import Tensor
from torch.utils._pytree import tree_flatten


class Compiler:
    """The process that compiles, and the functions that it compiled."""

    def __init__(self) -> None:
        path = f"{tempfile.mkdtemp()}/socket"
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.process = subprocess.Popen([sys.executable, Path(__file__).parent / "serve.py", path], env=env)
        self.connection: Connection = self._connected(path)
        self.functions: dict[str, Callable] = {}
        self.folder = Path(tempfile.mkdtemp())

    def _connected(self, path: str) -> Connection:
        while self.process.poll() is None:
            try:
                return Client(path, "AF_UNIX")
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.1)
        raise RuntimeError(f"The process that compiles failed with exit code {self.process.returncode}.")

    def run(self, name: str, args: tuple) -> list[Tensor]:
        """The outputs of a compiled function, whose kernels are interpreted."""
        leaves, spec = tree_flatten(args)
        self.connection.send((name, [_described(x) for x in leaves], spec))
        found = self.connection.recv()
        if isinstance(found, str):
            raise RuntimeError(found)
        calls, buffers, outputs = found
        memory = [torch.empty_strided(*sizes, dtype=dtype) for *sizes, dtype in buffers]
        for x in memory:
            x.fill_(torch.nan if x.is_floating_point() else 0)

        def tensor(place: tuple) -> Tensor:
            kind, which, *how = place
            if kind == "view":
                size, stride, offset = how
                return torch.as_strided(tensor(which), size, stride, tensor(which).storage_offset() + offset)
            return leaves[which].held if kind == "given" else memory[which]

        for of, source, names, values, grid, sizes in calls:
            values = [tensor(x) if isinstance(x, tuple) else x for x in values]
            self._launch(self._function(of, source), grid, names, values, sizes)
        return [tensor(place) for place in outputs]

    def _launch(self, function: Any, grid: str, names: list[str], values: list, sizes: dict[str, int]) -> None:
        if grid == "FixedGrid":
            function[tuple(values[-3:])](*values[:-3])
            return
        numbers = dict(zip(names, values, strict=False))
        if grid not in ("Grid1D", "Grid2DWithYZOverflow"):
            raise RuntimeError(f"There is no interpretation of the grid {grid}.")
        axes = "x" if grid == "Grid1D" else "xy"
        sizes = {name: size for name, size in sizes.items() if name in names}
        if axes == "x" and not any(name.startswith("R0_") for name in sizes):
            sizes["XBLOCK"] = max(sizes["XBLOCK"], 512)  # fewer programs
        function[tuple(-(-numbers[f"{x}numel"] // sizes[f"{x.upper()}BLOCK"]) for x in axes)](*values, **sizes)

    def _function(self, name: str, source: str) -> Any:
        """A kernel that Triton's interpreter can run: without inductor's decorator and without device functions."""
        if source not in self.functions:
            begin = source.index("@triton_heuristics.")
            end = source.index("@triton.jit", begin)
            source_here = source[:begin] + source[end:]
            source_here = source_here.replace("triton_helpers.set_driver_to_gpu()", "")
            for called in ("exp2", "log", "ceil", "floor"):
                source_here = source_here.replace(f"libdevice.{called}(", f"tl.{called}(")
            for called, value in (("tanh", "2 * tl.sigmoid(2 * x) - 1"), ("isnan", "x != x")):
                source_here = source_here.replace(f"libdevice.{called}(", f"_{called}(")
                source_here += f"\n\n@triton.jit\ndef _{called}(x):\n    return {value}\n"
            path = self.folder / f"kernel_{len(self.functions)}.py"  # the interpreter reads it from a file
            path.write_text(source_here)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            self.functions[source] = getattr(module, name)
        return self.functions[source]


def _described(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    if not isinstance(x, OnGPU):
        raise RuntimeError("A tensor on the CPU is handed to a kernel of the GPU.")
    if x.storage_offset():
        raise RuntimeError("A tensor that is part of another is handed to a kernel.")
    return tuple(x.shape), x.stride(), x.dtype, hasattr(x, "_dynamo_static_indices")

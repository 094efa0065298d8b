"""The process that compiles kernels for ``interpreter``, which starts it: python serve.py SOCKET.

It pretends to have a GPU, so it can't compute: a call is described by the shapes of its tensors, and the answer is the
source and the arguments of the kernels that the call launches.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import pretend

if __name__ == "__main__":
    pretend.with_libraries()
    _, launched = pretend.pretend()  # before others import inductor

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from sparse_prefill.kernel import flex


def serve(path: str, launches: list[tuple]) -> None:
    """Answer calls, described by the shapes of their tensors, with the source and the arguments of their kernels."""
    buffers: list[Tensor] = []
    views: dict[int, tuple] = {}
    guards: Any = torch._C._dynamo.guards
    empty = guards._empty_strided_cuda

    def noted(*args: Any) -> Tensor:
        buffers.append(empty(*args))
        return buffers[-1]

    def view(x: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
        found = x.as_strided(size, stride, x.storage_offset() + offset)
        views[id(found)] = found, x, tuple(size), tuple(stride), offset
        return found

    guards._empty_strided_cuda, guards._reinterpret_tensor = noted, view
    connection = Listener(path, "AF_UNIX").accept()
    while True:
        try:
            name, described, spec = connection.recv()
        except EOFError:
            return
        buffers.clear(), views.clear(), launches.clear()
        try:
            connection.send(answer(name, described, spec, launches, buffers, views))
        except Exception as error:  # the process that asked raises it
            connection.send(f"{type(error).__name__}: {str(error)[:1000]}")


def answer(name: str, described: list, spec: Any, launches: list, buffers: list, views: dict) -> tuple:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def made(x: Any) -> Any:
        if not isinstance(x, tuple):
            return x
        shape, stride, dtype, is_static = x
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device="cuda")
        if is_static:
            torch._dynamo.mark_static(tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), flex.one_graph_for_all_lengths():
        given = [made(x) for x in described]
        args = tree_unflatten(given, spec)
        module, _, function = name.partition(":")
        called = getattr(importlib.import_module(module), function)
        out = called()(*args) if function.startswith("compiled") else called(*args)

    def place(x: Tensor) -> tuple:
        for kind, among in (("given", given), ("buffer", buffers)):
            for i, other in enumerate(among):
                if other is x:
                    return kind, i
        _, of, *how = views[id(x)]
        return "view", place(of), *how

    calls = []
    for tuner, given_to in launches:
        source = Path(str(inspect.getsourcefile(tuner.fn.fn))).read_text()
        sizes = dict(tuner.launchers[0].config.kwargs) if tuner.launchers else {}
        values = [place(x) if isinstance(x, Tensor) else int(x) for x in given_to]
        calls.append(
            (tuner.fn.fn.__name__, source, tuner.fn.arg_names, values, tuner.inductor_meta["grid_type"], sizes)
        )
    outputs = [place(x) for x in tree_leaves(out)]
    return calls, [(tuple(x.shape), x.stride(), x.dtype) for x in buffers], outputs


if __name__ == "__main__":
    serve(sys.argv[1], launched)

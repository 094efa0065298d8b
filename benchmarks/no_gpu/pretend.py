"""Pretend that a GPU of compute capability 9.0 is there: kernels are lowered and compiled for it, and none runs.

Needs Linux, a CUDA build of torch with its triton, and a C compiler; no GPU and no driver. Import it before anything
that uses torch, in a script that runs as a separate process.

Tensors are those of ``FakeTensorMode``, on the device "cuda". Two small libraries answer what torch asks the CUDA
runtime and the driver. The replacements below answer what torch asks its Python modules.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

RUNTIME = """
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
"""
DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
"""
STARTED = "SPARSE_PREFILL_PRETENDS"
SHARED_BYTES = 232448  # of a block of threads
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))


def with_libraries() -> None:
    """Restart the script with the two libraries before the real ones, unless this is the restarted script."""
    if STARTED in os.environ:
        return
    folder = Path(tempfile.mkdtemp())
    for name, source in (("libruntime.so", RUNTIME), ("libcuda.so.1", DRIVER)):
        (folder / f"{name}.c").write_text(source)
        build = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(folder / f"{name}.c")]
        subprocess.run(build, check=True)
    os.environ["LD_PRELOAD"] = str(folder / "libruntime.so")
    os.environ["LD_LIBRARY_PATH"] = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    os.environ[STARTED] = str(folder)
    os.execv(sys.executable, [sys.executable, *sys.argv])


def needs_cuda_build() -> None:
    """Exit with a message if torch is no CUDA build, which can't compile for a GPU."""
    import torch

    if torch.version.cuda is None:
        sys.exit(f"This is torch {torch.__version__}, and compiling for a GPU needs a CUDA build (no GPU).")


@dataclass(frozen=True)
class Kernel:
    """Properties of a compiled kernel."""

    name: str
    warps: int
    shared: int  # bytes
    registers: int  # of a thread
    stack: int  # bytes of a thread, mostly spilled registers
    instructions: Counter[str]

    @property
    def wide_copies(self) -> int:
        """Asynchronous copies of 16 bytes to shared memory."""
        return self.instructions["cp.async 16"]

    @property
    def takes_tensors(self) -> bool:
        """Whether it copies whole tiles by the tensor memory accelerator (TMA)."""
        return self.instructions["cp.async.bulk.tensor"] > 0

    @property
    def narrow_loads(self) -> int:
        """Loads of two bytes."""
        return self.instructions["ld.global 2"]

    @property
    def products(self) -> int:
        """Instructions that multiply matrices."""
        return self.instructions["wgmma"] + self.instructions["mma"]


def count(ptx: str) -> Counter[str]:
    """Counts of asynchronous copies and of loads, by their bytes, and of matrix products."""
    found: Counter[str] = Counter()
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)", ptx):
        found[f"cp.async {int(size, 0)}"] += 1
    for vector, bits in re.findall(r"\bld\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        found[f"ld.global {int(vector or 1) * int(bits) // 8}"] += 1
    found["cp.async.bulk.tensor"] = len(re.findall(r"\bcp\.async\.bulk\.tensor", ptx))
    found["wgmma"] = len(re.findall(r"\bwgmma\.mma_async", ptx))
    found["mma"] = len(re.findall(r"\bmma\.sync", ptx))
    return found


def pretend() -> tuple[list[Kernel], list[tuple]]:
    """Replace the parts of torch and triton that need a GPU.

    Returns:
        tuple[list[Kernel], list[tuple]]: two lists that grow: the compiled kernels, and their launches, each the
        inductor object of a kernel and its arguments.
    """
    import torch

    _replace_device(torch)  # before inductor imports these functions
    import torch._inductor.config as inductor_config
    import torch._inductor.runtime.static_triton_launcher as launcher
    import torch._inductor.runtime.triton_heuristics as heuristics
    import torch._subclasses.fake_tensor as fake_tensor
    import triton
    from torch._inductor.fx_passes import fuse_attention, joint_graph, misc_patterns, pad_mm
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)  # inductor logs the whole source of kernels that don't compile
    fake_tensor.init_gpu_context = lambda device: None
    # Inductor tries patterns and constants with real tensors, and there are none.
    for module in (fuse_attention, misc_patterns, pad_mm):
        for name in [name for name in vars(module) if name.endswith("_init") and name.startswith("_")]:
            setattr(module, name, lambda *args, **options: None)
    joint_graph.constant_fold_uniform_value = lambda graph: None
    inductor_config.joint_graph_constant_folding = False
    inductor_config.compile_threads = 1
    inductor_config.force_disable_caches = True  # a kernel from a cache isn't compiled

    properties = {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
    driver = {
        "utils": SimpleNamespace(
            get_device_properties=lambda device: properties, load_binary=lambda *args: (0, 0, 32, 0, 1024)
        ),
        "launcher_cls": lambda self, *args: lambda *args: None,
        "get_current_target": lambda self: GPUTarget("cuda", 90, 32),
        "get_current_device": lambda self: 0,
        "get_active_torch_device": lambda self: torch.device("cuda", 0),
        "get_device_interface": lambda self: torch.cuda,
        "__init__": lambda self: None,
    }
    for name, value in driver.items():
        setattr(backends["nvidia"].driver, name, value)
    triton.runtime.driver.set_active(backends["nvidia"].driver())

    kernels: list[Kernel] = []
    compile_kernel = triton.compile

    def compile_and_note(*args: Any, **options: Any) -> Any:
        compiled = compile_kernel(*args, **options)
        kernels.append(_noted(compiled))
        return compiled

    launches: list[tuple] = []
    triton.compile = compile_and_note
    heuristics.CachingAutotuner.run = lambda self, *args, **options: launches.append((self, args))
    launcher.StaticallyLaunchedTritonKernel.load_kernel = _without_loading

    from sparse_prefill.core import fused, tensor_checks
    from sparse_prefill.kernel import compiled

    # These checks refuse tensors without values and modes that make them.
    compiled.check_can_run = lambda: None
    compiled._without_modes = nullcontext
    tensor_checks._check_has_values = lambda *tensors: None
    fused._dispatch_modes = lambda: 0
    return kernels, launches


def _replace_device(torch: Any) -> None:
    properties = SimpleNamespace(
        name="pretended, compute capability 9.0",
        major=9,
        minor=0,
        total_memory=80 * 2**30,
        multi_processor_count=132,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        warp_size=32,
        L2_cache_size=50 * 2**20,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=SHARED_BYTES,
        shared_memory_per_multiprocessor=233472,
        gcnArchName="",
    )
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "_lazy_init": None,
        "is_initialized": True,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "get_device_name": properties.name,
        "is_bf16_supported": True,
        "get_arch_list": ["sm_90"],
        "synchronize": None,
        "set_device": None,
        "get_rng_state": state,
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
    torch.cuda._DeviceGuard = lambda device: warnings.catch_warnings()  # a context that does nothing here
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda x, size, stride, offset=0: x.as_strided(
        size, stride, x.storage_offset() + offset
    )


def _noted(compiled: Any) -> Kernel:
    """What Triton compiled, with the registers that NVIDIA's tool finds in it."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"(REG|STACK):(\d+)", dump.stdout))
    name, warps, shared = compiled.metadata.name, compiled.metadata.num_warps, compiled.metadata.shared
    return Kernel(name, warps, shared, int(usage["REG"]), int(usage["STACK"]), count(compiled.asm["ptx"]))


def _without_loading(self: Any, device: int) -> None:
    self.function, self.n_regs, self.n_spills = 1, 0, 0

"""The probes of a GPU: a fresh interpreter that uses it the way a run does, one thing after another.

``main([device, dtype, name, ...])`` is called by ``doctor.programs``; ``doctor.gpu_results`` reads what it reports.
With device cpu, what does not need a GPU runs as well: gloo in place of NCCL, copies within host memory.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlpost.doctor.programs import Reports
from rlpost.workers.runtime import require_usable, write_environment

COPY_BYTES = 256 << 20
SLEEP_BYTES, SLEEPS = 64 << 20, 3
PATTERN = 7  # of the bytes that sleep
EXTENSIONS = ("_C", "_C_stable_libtorch", "_moe_C", "_moe_C_stable_libtorch", "cumem_allocator")

Result = dict[str, Any]


def torch_sees(device: str) -> Result:
    """Whether torch can use the GPU, with its own reason; the architectures it has kernels for."""
    require_usable(device)
    import torch

    count = torch.cuda.device_count()
    own = [list(torch.cuda.get_device_capability(n)) for n in range(count)]
    return {"count": count, "capabilities": own, "architectures": torch.cuda.get_arch_list()}


def copies(device: str) -> Result:
    """GB/s between pinned host memory and the device, and how long pinning takes."""
    import torch

    began = time.perf_counter()
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=device == "cuda")
    pinning_s = time.perf_counter() - began
    there = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)

    def speed(to: Any, of: Any) -> float:
        to.copy_(of)  # the first one is slower
        _wait(device)
        began = time.perf_counter()
        to.copy_(of, non_blocking=True)
        _wait(device)
        return COPY_BYTES / (time.perf_counter() - began) / 1e9

    return {"to_device": speed(there, host), "to_host": speed(host, there), "pinning_s": pinning_s}


def peers(device: str) -> Result:
    """Pairs of GPUs that cannot read each other's memory."""
    import torch

    numbers = range(torch.cuda.device_count())
    apart = [[a, b] for a in numbers for b in numbers if a != b and not torch.cuda.can_device_access_peer(a, b)]
    return {"count": len(numbers), "apart": apart}


def triton(device: str) -> Result:
    """Compiles and launches a kernel: gcc, Python.h and the driver in one."""
    import torch

    module = importlib.import_module("rlpost.doctor.triton_kernel")
    x = torch.arange(1000, dtype=torch.float32, device=device)
    module.add_one[(4,)](x, x.numel(), BLOCK=256)
    assert bool((x.cpu() == torch.arange(1, 1001)).all()), "the kernel computed other numbers"
    return {"version": module.triton.__version__}


def collective(device: str) -> Result:
    """A process group of one, and a sum in it."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    x = torch.full((4,), 3.0, device=device)
    dist.all_reduce(x)
    assert float(x.sum()) == 12.0, "the sum is another number"
    version = ".".join(map(str, torch.cuda.nccl.version())) if device == "cuda" else ""  # type: ignore[attr-defined]
    return {"backend": backend, "version": version}


def extensions(device: str) -> Result:
    """vLLM's compiled parts are imported, not only found: each links to libraries of CUDA and torch."""
    folder = Path(importlib.import_module("vllm").__file__ or "").parent
    if device == "cpu":  # which of them depends on the CPU: vLLM chooses
        importlib.import_module("vllm.platforms").current_platform.import_kernels()
        return {"loaded": ["those for this CPU"]}
    names = [name for name in EXTENSIONS if list(folder.glob(f"{name}.*so"))]
    for name in names:
        importlib.import_module(f"vllm.{name}")
    assert names, f"no compiled parts in {folder}"
    return {"loaded": names}


def sleeping(device: str) -> Result:
    """Memory that vLLM releases and takes back must be at the same address, with what was in it."""
    import torch

    allocator = importlib.import_module("vllm.device_allocator.cumem").CuMemAllocator.get_instance()
    with allocator.use_memory_pool("doctor"):
        x = torch.full((SLEEP_BYTES,), PATTERN, dtype=torch.uint8, device=device)
    address, freed, same = x.data_ptr(), 0, True
    began = time.perf_counter()
    for _ in range(SLEEPS):  # other processes take memory meanwhile: the most that was seen counts
        before = torch.cuda.mem_get_info()[0]
        allocator.sleep(offload_tags=("doctor",))
        freed = max(freed, torch.cuda.mem_get_info()[0] - before)
        allocator.wake_up()
        _wait(device)
        same = same and x.data_ptr() == address and bool((x == PATTERN).all())
    return {"freed": freed, "bytes": SLEEP_BYTES, "same": same, "seconds": (time.perf_counter() - began) / SLEEPS}


def compiler(device: str) -> Result:
    """nvcc's version and that of the headers it includes; only ZeRO-3's optimizer is compiled with them."""
    torch = importlib.import_module("torch")
    home = importlib.import_module("torch.utils.cpp_extension").CUDA_HOME
    own = Path(home or "/nowhere") / "bin" / "nvcc"
    nvcc = str(own) if own.is_file() else shutil.which("nvcc")
    if nvcc is None:
        return {"nvcc": ""}
    version = read_nvcc(_output([nvcc, "--version"]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "version.cu"
        file.write_text("CUDART_VERSION\n")
        headers = read_headers(_output([nvcc, "-E", str(file)]))
    return {"nvcc": version, "headers": headers, "path": nvcc, "torch": torch.version.cuda or ""}


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60).stdout


def read_nvcc(said: str) -> str:
    """13.0 of ``Cuda compilation tools, release 13.0, V13.0.88``."""
    return said.partition("release ")[2].partition(",")[0].strip()


def read_headers(said: str) -> str:
    """13.0 of the 13000 that the preprocessor leaves of ``CUDART_VERSION``, as its last line; empty if it does not."""
    last = (said.split() or [""])[-1]
    return f"{int(last) // 1000}.{int(last) % 1000 // 10}" if last.isdigit() else ""


def _wait(device: str) -> None:
    if device == "cuda":
        importlib.import_module("torch").cuda.synchronize()


PROBES: dict[str, Callable[[str], Result]] = {
    "torch": torch_sees,
    "copies": copies,
    "peers": peers,
    "triton": triton,
    "collective": collective,
    "extensions": extensions,
    "sleeping": sleeping,
    "compiler": compiler,
}


def main(arguments: Sequence[str]) -> None:
    device, dtype, *names = arguments
    write_environment(device=device, dtype=dtype, threads=1, vocab_size=0)
    reports = Reports()
    for name in names:
        reports.attempt(name, lambda name=name: PROBES[name](device))  # type: ignore[misc]
    reports.end()

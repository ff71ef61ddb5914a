"""Stage 0: what the machine has, and how fast host and device exchange memory. Stage 9: what compiled kernels weigh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import time
from getpass import getuser
from pathlib import Path
from tempfile import gettempdir

import psutil

from benchmarks.gpu.record import Record, Settings

GB = 10**9
LOWEST_DRIVER = 580  # for CUDA 13, which the pinned torch is built for
PINNED_BYTES = {False: 4 << 30, True: 4 << 20}


def run(settings: Settings, record: Record) -> None:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    record.note(gcc=shutil.which("gcc") is not None, python_h=header.exists(), ram_free_gb=free_ram() / GB)
    if settings.on_gpu:
        # Triton compiles its launchers on first use.
        record.require(shutil.which("gcc") is not None, "no gcc: install it")
        record.require(header.exists(), f"no {header}: install python3-dev")
        driver = driver_version()
        record.note(driver=driver)
        record.require(int(driver.split(".")[0] or 0) >= LOWEST_DRIVER, f"driver {driver}, older than {LOWEST_DRIVER}")
    copy_both_ways(settings, record)


def copy_both_ways(settings: Settings, record: Record) -> None:
    """Host memory to the device and back; on a CPU, memory to memory."""
    import torch

    if settings.on_gpu:
        free, total = torch.cuda.mem_get_info()
        record.note(gpu=torch.cuda.get_device_name().replace(" ", "_"), gpu_gb=total / GB, gpu_free_gb=free / GB)
        major, minor = torch.cuda.get_device_capability()
        record.note(capability=f"{major}.{minor}", torch_cuda=torch.version.cuda)
    size = min(PINNED_BYTES[settings.small], int(free_ram() // 4))
    start = time.perf_counter()
    host = torch.empty(size, dtype=torch.uint8, pin_memory=settings.on_gpu)
    host.fill_(1)
    record.note(copied_gb=size / GB, pin_s=time.perf_counter() - start)
    there = torch.empty(size, dtype=torch.uint8, device=settings.device)
    for name, target, source in (("to_device_gb_s", there, host), ("to_host_gb_s", host, there)):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            if settings.on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        record.note(**{name: size / min(seconds) / GB})
    record.require(bool((host[:: 1 << 12] == 1).all()), "other bytes came back than were sent")


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0].strip()


def free_ram() -> int:
    return int(psutil.virtual_memory().available)


def caches(settings: Settings, record: Record) -> None:
    """Where vLLM, torch and Triton keep what they compiled, in MiB; carried along, it saves the next first start."""
    home = Path.home()
    variables = os.environ.get
    folders = {
        "vllm": variables("VLLM_CACHE_ROOT") or str(Path(variables("XDG_CACHE_HOME", str(home / ".cache"))) / "vllm"),
        "inductor": variables("TORCHINDUCTOR_CACHE_DIR") or str(Path(gettempdir()) / f"torchinductor_{getuser()}"),
        "triton": variables("TRITON_CACHE_DIR") or str(home / ".triton" / "cache"),
    }
    record.note(**{f"{name}_mib": weigh(Path(folder)) for name, folder in folders.items()})


def weigh(folder: Path) -> float:
    """MiB of the regular files below; 0 if there is no such folder."""
    total = 0
    for root, _, names in os.walk(folder):
        files = (Path(root) / name for name in names)
        total += sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())
    return total / 2**20

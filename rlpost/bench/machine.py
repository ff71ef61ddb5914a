"""What a benchmark ran on, in words. Called by ``bench.learning`` and ``benchmarks/peers``."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """Such as ``Intel(R) Xeon(R) Processor``; the architecture where /proc/cpuinfo names none."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())

"""What a benchmark ran on: machine, revision, packages. Called by ``rlpost.bench`` and ``benchmarks/peers``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from rlpost import __version__
from rlpost.config.locations import PACKAGE

PACKAGES = ("torch", "vllm", "deepspeed")


def cpu_name() -> str:
    """For example ``Intel(R) Xeon(R) Processor``; the architecture if /proc/cpuinfo gives no name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def describe_machine() -> str:
    """For example ``2 cores, Intel(R) Xeon(R) Processor``."""
    return f"{os.cpu_count()} cores, {cpu_name()}"


def find_revision() -> str:
    """The checkout's commit, with + if its files differ; outside a checkout the version."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return __version__


def find_versions() -> dict[str, str]:
    """Package -> installed version, also if a CPU build has another name; "unknown" if there is none."""
    return {name: _version_of(name) for name in PACKAGES}


def _version_of(name: str) -> str:
    for distribution in (name, f"{name}-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"

"""What a container may use of its machine: the CPU quota and the memory limit of its control group, v1 or v2.

``proc`` and ``cgroup`` are the folders, /proc and /sys/fs/cgroup.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlpost.doctor.findings import Finding, ok, warning
from rlpost.preflight.device_plan import format_bytes

NO_LIMIT = 1 << 60  # v1 writes a number near 2**63 for "no limit"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLimit:
    limit: int  # bytes
    used: int

    @property
    def free(self) -> int:
        return max(0, self.limit - self.used)


def group_folders(proc: Path, cgroup: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group and of all groups above it, where limits may stand."""
    file = proc / "self" / "cgroup"
    for line in file.read_text().splitlines() if file.is_file() else []:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and controller not in names:
            continue
        tops = [cgroup / controllers, cgroup / controller] if controllers else [cgroup]
        for top in tops:
            group = top / path.lstrip("/")
            yield from [group, *(above for above in group.parents if top in (above, *above.parents))]


def find_cpu_quota(proc: Path, cgroup: Path) -> float | None:
    """Cores' worth of time, the smallest quota that holds; None: none is set."""
    quotas = []
    for folder in group_folders(proc, cgroup, "cpu"):
        v1 = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        both = _words(folder / "cpu.max") or v1
        if len(both) == 2 and both[0] not in ("max", "-1"):
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def find_memory_limit(proc: Path, cgroup: Path) -> MemoryLimit | None:
    found = []
    for folder in group_folders(proc, cgroup, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            words = _words(folder / limit)
            if words and words[0] != "max" and int(words[0]) < NO_LIMIT:
                found.append(MemoryLimit(limit=int(words[0]), used=int((_words(folder / used) or ["0"])[0])))
    return min(found, key=lambda one: one.limit, default=None)


def check_cpu_quota(quota: float | None, cores: int, threads: int | None) -> Finding:
    """``cores``: those this process may run on, which is what libraries count. ``threads``: the key, if it is set."""
    if quota is None:
        return ok("CPU quota", f"none; {cores} cores")
    found = f"{quota:g} cores' worth of time on {cores} cores"
    if quota >= (threads or cores):
        return ok("CPU quota", found)
    fit = max(1, int(quota))
    found += f"; torch and vLLM would start {threads or cores} threads, which stop each other"
    return warning("CPU quota", found, f"add threads={fit} to the command, or raise the container's --cpus")


def check_memory_limit(limit: MemoryLimit | None, available: int, device: str, kv_cache_bytes: int | None) -> Finding:
    """``available``: the machine's free memory, from which a CPU's KV cache is sized. ``kv_cache_bytes``: the key."""
    if limit is None:
        return ok("memory limit", "none")
    found = f"{format_bytes(limit.limit)}, {format_bytes(limit.used)} of it used"
    if device == "cuda" or kv_cache_bytes is not None or limit.free >= available:
        return ok("memory limit", found)
    found += f"; the KV cache would be sized from the machine's free {format_bytes(available)}"
    return warning("memory limit", found, f"add engine.kv_cache_bytes={limit.free // 4} to the command")


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []

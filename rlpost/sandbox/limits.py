"""What one program may use. Read on both sides of the sandbox; standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace

WALL_FACTOR = 10.0  # wall time only catches what CPU time cannot: sleeping, and a machine too busy to run anything
MIN_WALL_S = 2.0
STALLED_CPU_SHARE = 0.05  # less of its CPU limit than this, in ten times the limit, alone: it used no CPU
TESTER_CPU_FACTOR = 2.0  # the tests' own work, over the program's limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of one program, and the same for the tester beside it (its CPU limit is twice as high)."""

    cpu_s: float = 4.0  # user and system time of the whole process
    memory_bytes: int = 512 << 20  # address space on top of the bare interpreter's
    tmp_bytes: int = 16 << 20  # all files in /tmp together
    output_bytes: int = 4 << 20  # standard output, and any single file or returned value
    processes: int = 1  # more than 1: forking is allowed, and CPU and memory limits hold for each process
    threads: int = 32  # threads and processes together
    open_files: int = 64

    @property
    def wall_s(self) -> float:
        """The backstop."""
        return max(WALL_FACTOR * self.cpu_s, MIN_WALL_S)

    def for_tester(self) -> Limits:
        """Of the process that runs the tests: it forks nothing and has its own work to do."""
        return replace(self, cpu_s=TESTER_CPU_FACTOR * self.cpu_s, processes=1)

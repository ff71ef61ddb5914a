"""What one program may use. Read on both sides of the sandbox; standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace

WALL_FACTOR = 10.0  # wall time only catches what CPU time cannot: sleeping, and a machine too busy to run anything
MIN_WALL_S = 1.0
# A program that used less than this in ten times its CPU limit, alone, used no CPU: startup takes up to 0.02 s.
STALLED_CPU_SHARE, MIN_STALLED_CPU_S = 0.05, 0.05
TESTER_CPU_FACTOR = 2.0  # for the tests' own work, over the program's limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one program, and of the tester beside it (whose CPU limit is twice as high)."""

    cpu_s: float = 4.0  # user and system time of the whole process
    memory_bytes: int = 512 << 20  # address space on top of the bare interpreter's
    tmp_bytes: int = 16 << 20  # all files in /tmp together
    output_bytes: int = 4 << 20  # standard output, and any single file or returned value
    threads: int = 32  # of its single process: nothing can be forked
    open_files: int = 64

    @property
    def wall_s(self) -> float:
        """The backstop."""
        return max(WALL_FACTOR * self.cpu_s, MIN_WALL_S)

    @property
    def stalled_cpu_s(self) -> float:
        return max(STALLED_CPU_SHARE * self.cpu_s, MIN_STALLED_CPU_S)

    def for_tester(self) -> Limits:
        """Limits of the process that runs the tests, which has its own work to do."""
        return replace(self, cpu_s=TESTER_CPU_FACTOR * self.cpu_s)

"""One real sandbox per module. Where the machine allows none, these tests fail with the sandbox's own message; they are
never skipped: without them nobody knows whether programs are isolated."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlpost.sandbox.box import Sandbox
from rlpost.sandbox.limits import Limits
from rlpost.sandbox.locks import Turns

QUICK = Limits(cpu_s=0.3, memory_bytes=64 << 20, tmp_bytes=1 << 20, output_bytes=1 << 18)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(turns=Turns(tmp_path_factory.mktemp("locks"))) as box:
        box.start()
        yield box


def descendants(pid: int) -> set[int]:
    """All processes below ``pid``, as the host sees them."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = set()
    level = {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found |= level
    return found


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def processes_of(box: Sandbox) -> set[int]:
    assert box._guardian is not None and box._owner == os.getpid()
    return descendants(box._guardian.pid)

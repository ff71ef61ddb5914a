"""Members of engines over a real world of processes: whom they hear, and what a member's death is to the others."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest

from rlpost.engine.tensor_parallel_group import form_groups
from rlpost.workers.engine_map import EngineMap

pytestmark = pytest.mark.own_process  # forks, which a process with threads of other tests had better not


def run_world(world: int, speak: Callable[[int], None]) -> list[int]:
    """Exit codes of ``world`` processes that meet at one port and do ``speak(rank)``; forked to import torch once.

    The store comes after the forks and its port through a pipe: its thread may hold a lock of libc, and a child that is
    forked then would wait for it for ever.
    """
    from torch.distributed import TCPStore

    reads, writes = os.pipe()
    children = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            _be_a_member(rank, world, reads, speak)
        children.append(pid)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writes, b"%5d" % store.port * world)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    os.close(reads)
    os.close(writes)
    return codes


def _be_a_member(rank: int, world: int, reads: int, speak: Callable[[int], None]) -> None:
    code = 1
    try:
        import torch.distributed as dist

        port = int(os.read(reads, 5))
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        speak(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def test_eight_workers_form_their_engines_groups_at_one_port() -> None:
    def speak(rank: int) -> None:
        for tp in (2, 4):
            engines = EngineMap(num_workers=8, tensor_parallel=tp)
            ranks = engines.members(engines.engine_of(rank))
            group = form_groups(engines.groups, rank)
            rows = group.gather(np.array([rank, tp], np.int64))
            assert rows.tolist() == [[r, tp] for r in ranks]
            words = b"from %d" % ranks[0]
            heard = group.share(words if group.rank == 0 else b"", len(words))
            assert heard == words and group.names == [f"worker {r}" for r in ranks]

    assert run_world(8, speak) == [0] * 8


def test_a_meeting_fails_at_once_where_a_member_died() -> None:
    """The others must not wait for the group's own timeout, half an hour: the controller ends them when they say so."""

    def speak(rank: int) -> None:
        group = form_groups([[0, 1]], rank)
        row = np.zeros(3, np.int64)
        group.gather(row)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            group.gather(row)
        except RuntimeError:
            assert time.monotonic() - began < 20
            return
        raise AssertionError("it met a dead member")

    assert run_world(2, speak) == [0, -signal.SIGKILL]

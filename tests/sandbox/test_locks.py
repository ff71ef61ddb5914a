"""Locks between sandboxes of one machine."""

import os
import threading
import time
from pathlib import Path

import pytest

from rlpost.errors import RunError
from rlpost.sandbox.locks import Turns


class Visitor(threading.Thread):
    """Holds a turn until it is let go; ``inside`` says whether it has it."""

    def __init__(self, folder: Path, how: str) -> None:
        super().__init__(daemon=True)
        self.turns, self.how = Turns(folder), how
        self.inside, self.let_go = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        with getattr(self.turns, self.how)():
            self.inside.set()
            self.let_go.wait(30)

    def leave(self) -> None:
        self.let_go.set()
        self.join(30)


def test_everybody_runs_together(tmp_path: Path) -> None:
    visitors = [Visitor(tmp_path, "together") for _ in range(3)]
    assert all(visitor.inside.wait(10) for visitor in visitors)
    for visitor in visitors:
        visitor.leave()


def test_one_that_must_be_alone_waits_for_the_others_and_newcomers_wait_for_it(tmp_path: Path) -> None:
    first = Visitor(tmp_path, "together")
    assert first.inside.wait(10)
    alone = Visitor(tmp_path, "alone")
    time.sleep(0.2)
    newcomer = Visitor(tmp_path, "together")
    assert not alone.inside.wait(0.2) and not newcomer.inside.is_set()
    first.leave()
    assert alone.inside.wait(10) and not newcomer.inside.wait(0.2)
    alone.leave()
    assert newcomer.inside.wait(10)
    newcomer.leave()


def test_a_turn_ends_with_its_process(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        with Turns(tmp_path).alone():
            os._exit(0)
    os.waitpid(pid, 0)
    visitor = Visitor(tmp_path, "together")
    assert visitor.inside.wait(10)
    visitor.leave()


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("locks", "link"):
        with pytest.raises(RunError, match="closed to others"):
            Turns(tmp_path / name)

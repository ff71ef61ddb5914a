"""What a run leaves outside its processes is removed when its controller ends, also where it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rlpost.workers.cluster.cleanup import Cleaner


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def folder_with_files(path: Path) -> Path:
    (path / "a folder").mkdir(parents=True)
    (path / "a folder" / "a file").touch()
    return path


def test_swept_in_good_order_all_is_gone_at_once(tmp_path: Path) -> None:
    kept, private, other = (folder_with_files(tmp_path / name) for name in ("kept -1", "private", "other"))
    cleaner = Cleaner([kept], private=private)
    assert kept.exists()
    cleaner.clean_up()
    assert not kept.exists() and not private.exists() and other.exists()


def test_a_process_that_is_killed_leaves_nothing_and_nobody_in_its_private_folder(tmp_path: Path) -> None:
    kept, private = folder_with_files(tmp_path / "kept-1"), folder_with_files(tmp_path / "private")
    program = (
        "import sys, time; from pathlib import Path; from rlpost.workers.cluster.cleanup import Cleaner\n"
        "cleaner = Cleaner([Path(sys.argv[1])], private=Path(sys.argv[2])); print('ready', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(kept), str(private)], stdout=subprocess.PIPE, text=True
    )
    with open(private / "a log", "w") as log, open(tmp_path / "log", "w") as own:
        left_over = subprocess.Popen(["sleep", "60"], stdout=log)
        stranger = subprocess.Popen(["sleep", "60"], stdout=own)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        os.kill(owner.pid, signal.SIGKILL)
        assert eventually(lambda: not kept.exists() and not private.exists())
        assert left_over.wait(5) == -signal.SIGKILL and stranger.poll() is None
        kept.mkdir()  # a worker of the killed one that writes once more
        assert eventually(lambda: not kept.exists())
    finally:
        for process in (owner, left_over, stranger):
            process.kill()

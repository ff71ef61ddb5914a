"""Lives of real runs, each a process of its own that starts fast and can be killed at a named place or moment.

``Nursery`` keeps one process that has imported everything heavy and nothing else; each life is forked from it, runs
``rlpost`` as the command line does, and ends by itself or by a real SIGKILL. Without it a life would spend ten seconds
on imports. The places are functions of the program, wrapped in the life that is to die: nothing in the program knows.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .program import on_cpu

KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class Place:
    """``where``: ``module:function`` or ``module:Class.method``. Death comes ``before``, ``after`` or, in a context
    manager, at the ``end`` of its ``nth`` call of that life."""

    where: str
    when: str = "before"
    nth: int = 1


@dataclass(frozen=True)
class Life:
    status: int  # of the process; negative: the signal that ended it
    output: str
    seconds: float


class Nursery:
    """Use as a context manager."""

    def __init__(self, folder: Path, *, own_mounts: bool = False, ready: bool = True) -> None:
        """``own_mounts``: the lives see a mount namespace of their own, in which :meth:`run` may mount things.
        ``ready``: everything heavy is imported before the first life."""
        self._arguments = [] if ready else ["unprepared"]
        self.folder = folder
        self._log = folder / "life.log"
        self._prefix = ["unshare", "--map-root-user", "--mount"] if own_mounts else []

    def __enter__(self) -> Nursery:
        self._start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._end()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [*self._prefix, sys.executable, "-m", "tests.e2e.lives", *self._arguments],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that its lives end with it
        )

    def _end(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def live(
        self,
        *argv: str,
        place: Place | None = None,
        after_s: float | None = None,
        number: int = signal.SIGKILL,
        cwd: Path | None = None,
    ) -> Life:
        """One life of ``rlpost ARGV`` in ``cwd`` (else ``folder``); the signal ``number`` is sent at ``place``, or
        ``after_s`` seconds after the run's first sign of life (its first line of output)."""
        order = {
            "argv": on_cpu(argv),
            "cwd": str(cwd or self.folder),
            "log": str(self._log),
            "place": asdict(place) if place else None,
            "after_s": after_s,
            "signal": int(number),
        }
        started = time.monotonic()
        status = self._ask(order)
        return Life(status, self._log.read_text(), time.monotonic() - started)

    def run(self, *command: str) -> None:
        """A command where the lives are, in their mount namespace."""
        assert self._ask({"command": list(map(str, command))}) == 0, command

    def _ask(self, order: dict[str, Any]) -> int:
        """The order's exit status. A process that was left before it answered is ended and replaced: the test that
        was interrupted fails, and no later one reads its answer."""
        if self._process.poll() is not None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the nursery died"
            return int(json.loads(answer))
        except BaseException:
            self._end()
            raise


def prepare() -> None:
    """Everything that takes a run's first seconds, done once."""
    from rlpost.config import Config
    from rlpost.workers.runtime import write_environment

    write_environment(device="cpu", dtype="float32", threads=1, vocab_size=18)
    import deepspeed  # noqa: F401
    import vllm.v1.engine.llm_engine  # noqa: F401

    import rlpost.engine.vllm
    import rlpost.loop
    import rlpost.train.deepspeed_trainer  # noqa: F401

    assert Config and rlpost.loop


def serve() -> None:
    """The nursery's process: orders in, exit statuses out."""
    for line in sys.stdin:
        order = json.loads(line)
        if "command" in order:
            print(subprocess.run(order["command"]).returncode, flush=True)
            continue
        child = os.fork()
        if child == 0:
            live(order)
        if order["after_s"] is not None:
            kill_later(child, order)
        status = os.waitpid(child, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)


def live(order: dict[str, Any]) -> None:
    code = 99
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        os.chdir(order["cwd"])
        if order["place"]:
            arm(Place(**order["place"]), order["signal"])
        from rlpost.cli import main

        code = main(order["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def kill_later(child: int, order: dict[str, Any]) -> None:
    log = Path(order["log"])
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.005)
    time.sleep(order["after_s"])
    os.kill(child, order["signal"])


def arm(place: Place, number: int) -> None:
    module, _, path = place.where.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    calls = 0

    def die() -> None:
        os.kill(os.getpid(), number)
        if number != signal.SIGKILL:
            time.sleep(0.01)  # the handler runs before the next line of Python

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == place.nth
        if now and place.when == "before":
            die()
        result = original(*args, **kwargs)
        if now and place.when == "after":
            die()
        if now and place.when == "end":
            return _dying_at_its_end(result, die)
        return result

    setattr(owner, name, wrapped)


def _dying_at_its_end(manager: Any, die: Any) -> Any:
    import contextlib

    @contextlib.contextmanager
    def dying() -> Any:
        with manager:
            yield
            die()

    return dying()


if __name__ == "__main__":
    if "unprepared" not in sys.argv:
        prepare()
    serve()

"""A run on two Ray workers as tests see it: its workers' processes, blows dealt to them, and what it leaves behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rlpost.workers.cluster.shards import PREFIX, attempt_dir
from rlpost.workers.cluster.workers import SCRATCH

from .program import SMALL, command

RUN = Path("runs/arithmetic")
CLUSTER = ["train", "recipe=math/arithmetic", "cluster=ray", "cluster.heartbeat_s=0.5", "cluster.hang_s=8", *SMALL]
STARTING = ("start", "recover")


class Place:
    """Where runs live, with a folder of their own for temporary files: by it their traces are told from others'."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temp = Path(tempfile.mkdtemp(prefix="rlc-", dir="/tmp"))  # short: Ray's sockets lie in it

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.temp, ignore_errors=True)

    def start(self, *arguments: str, log: Path | None = None) -> subprocess.Popen[str]:
        """``rlpost train`` on two workers; output goes to ``log``, else to a pipe."""
        environment = {**os.environ, "TMPDIR": str(self.temp)}
        with open(log or os.devnull, "a") as file:
            output = file if log else subprocess.PIPE
            return subprocess.Popen(
                command(*CLUSTER, *arguments),
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def status(self, run: Path = RUN) -> dict:
        try:
            return json.loads((self.folder / run / "status.json").read_text())
        except (OSError, ValueError):  # not there yet, or being written
            return {}

    def is_at(self, phase: str, step: int) -> bool:
        """Whether the run is in this phase with at least so many steps finished."""
        status = self.status()
        return status.get("phase") == phase and status["step"] >= step

    def kept(self, run: Path = RUN) -> Path:
        """Where a run keeps states, but for the end of the name, which each life has for itself."""
        return attempt_dir("/dev/shm", PREFIX, self.folder / run)

    def left_outside(self, run: Path = RUN) -> list[str]:
        """Folders outside the run's own."""
        places = self.kept(run), attempt_dir("/tmp", SCRATCH, self.folder / run)
        return [str(p) for life in places for p in life.parent.glob(life.name.rpartition("-")[0] + "-*")]

    def traces(self, run: Path = RUN) -> list[str]:
        """Processes, folders and shared memory of runs that should have ended."""
        found = [*self.left_outside(run), *map(str, self.temp.glob("rlpost-ray-*"))]
        return found + [f"{pid} {name}" for pid, name in processes() if self._is_ours(pid, name)]

    def _is_ours(self, pid: int, name: str) -> bool:
        """A process that was told of our folders, or has a file in them open."""
        ours = (str(self.temp), str(self.folder))
        if any(folder in name for folder in ours):
            return True
        try:
            files = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:  # it ended
            return False
        return pid != os.getpid() and any(file.startswith(folder) for file in files for folder in ours)


def processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it ended meanwhile
                continue


def workers_below(pid: int) -> list[int]:
    """Worker processes of the Ray that process ``pid`` started."""
    children: dict[int, list[int]] = {}
    names = dict(processes())
    for number in names:
        try:
            parent = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(number)
    found, below = [], [pid]
    while below:
        for child in children.get(below.pop(), []):
            below.append(child)
            if names[child].startswith("ray::_Actor"):
                found.append(child)
    return sorted(found)


class Assassin:
    """Strikes one worker whenever the run is in the given phase, once for each (phase, signal), in this order."""

    def __init__(self, place: Place, process: subprocess.Popen, strikes: list[tuple[str, int]]) -> None:
        self.place, self.process, self.strikes = place, process, list(strikes)
        self.struck: list[tuple[str, int]] = []
        threading.Thread(target=self._hunt, daemon=True).start()

    def _hunt(self) -> None:
        last_step = 0
        while self.strikes and self.process.poll() is None:
            phase, number = self.strikes[0]
            status = self.place.status()
            if status.get("phase") == phase and status.get("step", 0) > last_step:
                workers = workers_below(self.process.pid)
                if len(workers) == 2:
                    os.kill(workers[len(self.struck) % 2], number)
                    last_step = status["step"]
                    self.struck.append(self.strikes.pop(0))
            time.sleep(0.005)


def run_and_strike(
    place: Place, *arguments: str, strikes: list[tuple[str, int]], timeout_s: float = 400
) -> tuple[str, Assassin]:
    process = place.start(*arguments)
    try:
        assassin = Assassin(place, process, strikes)
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output, assassin


def strike_at_random(
    place: Place, number: int, seed: int, arguments: Sequence[str], *, controller_share: float = 0.15
) -> tuple[list[str], list[str]]:
    """SIGKILL to a random worker, or now and then to the controller, ``number`` times; then the run may end.

    Where a run ends before its time the next one begins. Returns (names of the runs, blows).
    """
    rng = random.Random(seed)
    runs, blows, log = ["torture-1"], [], place.folder / "torture.log"
    while True:
        process = place.start(f"name={runs[-1]}", *arguments, log=log)
        try:
            while len(blows) < number and process.poll() is None:
                blow = _strike(rng, place, process, Path("runs") / runs[-1], controller_share)
                blows += [blow] if blow else []
            status = process.wait(timeout=900)
        finally:
            process.kill()
        if status == -signal.SIGKILL:
            continue
        assert status == 0, log.read_text()[-6000:]
        if len(blows) >= number:
            return runs, blows
        runs.append(f"torture-{len(runs) + 1}")


def _strike(rng: random.Random, place: Place, process: subprocess.Popen, run: Path, controller_share: float) -> str:
    """One blow, most often a short while after the workers are back; what it was, or nothing where nobody was there."""
    if rng.random() < 0.7:
        before = place.status(run)
        eventually(lambda: _is_working(place, run, before) or process.poll() is not None, 120)
    time.sleep(rng.expovariate(1 / 2.0))
    phase = place.status(run).get("phase", "start")
    victims = workers_below(process.pid)
    if process.poll() is None and rng.random() < controller_share:
        process.kill()
        process.wait()
        return f"controller in {phase}"
    if victims:
        os.kill(rng.choice(victims), signal.SIGKILL)
        return f"worker in {phase}"
    return ""


def _is_working(place: Place, run: Path, before: dict) -> bool:
    """Whether the workers are at something, and the run has said so since ``before``."""
    now = place.status(run)
    return now != before and now.get("phase") not in (None, *STARTING)


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()

"""A run on two Ray workers, with real Ray, vLLM and DeepSpeed: it trains, survives losses of each kind, leaves nothing.

One run takes three losses, one of each kind: a worker killed while it generates, one killed in the update, and one that
hangs. Then a worker is killed where no state was kept outside, and the run goes back to its checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.program import SMALL, command, rlpost, rollouts_of, steps_of

RUN = Path("runs/arithmetic")
CLUSTER = ["train", "recipe=math/arithmetic", "cluster=ray", "cluster.heartbeat_s=0.5", "cluster.hang_s=8", *SMALL]


def status_of(folder: Path) -> dict:
    try:
        return json.loads((folder / RUN / "status.json").read_text())
    except (OSError, ValueError):  # not there yet, or being written
        return {}


def workers_below(pid: int) -> list[int]:
    """Worker processes of the Ray that process ``pid`` started."""
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it ended meanwhile
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, below = [], [pid]
    while below:
        for child in children.get(below.pop(), []):
            below.append(child)
            if names[child].startswith("ray::_Actor"):
                found.append(child)
    return sorted(found)


class Assassin:
    """Strikes one worker whenever the run is in the given phase, once for each (phase, signal), in this order."""

    def __init__(self, folder: Path, process: subprocess.Popen, strikes: list[tuple[str, int]]) -> None:
        self.folder, self.process, self.strikes = folder, process, list(strikes)
        self.struck: list[tuple[str, int]] = []
        threading.Thread(target=self._hunt, daemon=True).start()

    def _hunt(self) -> None:
        last_step = 0
        while self.strikes and self.process.poll() is None:
            phase, number = self.strikes[0]
            status = status_of(self.folder)
            if status.get("phase") == phase and status.get("step", 0) > last_step:
                workers = workers_below(self.process.pid)
                if len(workers) == 2:
                    os.kill(workers[len(self.struck) % 2], number)
                    last_step = status["step"]
                    self.struck.append(self.strikes.pop(0))
            time.sleep(0.005)


def run_and_strike(folder: Path, *arguments: str, strikes: list[tuple[str, int]]) -> tuple[str, Assassin]:
    process = subprocess.Popen(
        command(*CLUSTER, *arguments), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assassin = Assassin(folder, process, strikes)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output, assassin


def leftovers() -> set[str]:
    """What Ray and the workers leave where they are not cleaned up."""
    found = {str(p) for p in [*Path("/dev/shm").glob("rlpost-shards-*"), *Path("/tmp").glob("rlpost-ray-*")]}
    listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return found | {
        line for line in listing.splitlines() if re.search(r"^ *\d+ (ray::|\S*/raylet |\S*/gcs_server )", line)
    }


BEFORE = leftovers()  # another Ray on this machine is none of our business


def left_behind() -> set[str]:
    return leftovers() - BEFORE


def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()


def check_account(folder: Path, steps: int) -> None:
    """Every step trained once, whole groups, no sample twice, and a ledger that adds up."""
    trained = rollouts_of(folder / RUN)
    assert sorted(trained) == list(range(1, steps + 1))
    keys = [(row["uid"], row["index"]) for rows in trained.values() for row in rows]
    assert len(keys) == len(set(keys)) == 16 * steps
    assert [int(row["step"]) for row in steps_of(folder / RUN)] == list(range(1, steps + 1))
    assert "trained" in rlpost("buffer", str(RUN), cwd=folder)


def test_a_run_survives_a_death_in_generation_one_in_the_update_and_a_hang(tmp_path: Path) -> None:
    strikes = [("generate", signal.SIGKILL), ("update", signal.SIGKILL), ("generate", signal.SIGSTOP)]
    output, assassin = run_and_strike(tmp_path, "steps=8", strikes=strikes)
    assert assassin.struck == strikes, output
    assert output.count("workers are started anew") == 3, output
    assert "died in phase 'update'" in output and re.search("no sign of life for .* s in phase|did not end its", output)
    assert "goes back to its last checkpoint" not in output, "the state was kept: no finished step is made again"
    check_account(tmp_path, 8)
    assert eventually(lambda: not left_behind()), left_behind()


def test_without_a_kept_state_the_run_goes_back_to_its_checkpoint_and_says_what_that_costs(tmp_path: Path) -> None:
    output, assassin = run_and_strike(
        tmp_path,
        "steps=4",
        "checkpoint.every=2",
        "cluster.keep_shards=false",
        strikes=[("update", signal.SIGKILL)],
    )
    assert assassin.struck, output
    assert "goes back to its last checkpoint" in output, output
    check_account(tmp_path, 4)
    assert eventually(lambda: not left_behind()), left_behind()


def test_ctrl_c_saves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(*CLUSTER, "steps=1000"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert eventually(lambda: status_of(tmp_path).get("step", 0) >= 1, 120)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "the same command goes on from there" in output
    assert eventually(lambda: not left_behind()), left_behind()


@pytest.mark.parametrize("setting", ["cluster.address=127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_a_clear_error(tmp_path: Path, setting: str) -> None:
    output = rlpost(*CLUSTER, setting, cwd=tmp_path, expect=3)
    assert "cluster.address" in output and "ray start --head" in output

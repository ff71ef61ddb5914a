"""Disks that fill up or cannot be written: a clear line, exit status 3, nothing lost, and the same command goes on."""

from __future__ import annotations

import os
import subprocess

import pytest

from .lives import Nursery
from .test_kills import RUN, SAME, assert_the_same_run


def can_mount():
    probe = ["unshare", "--map-root-user", "--mount", "true"]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """Lives that see small disks of their own; ``folder/disk`` is where they are mounted."""
    if not can_mount() and not os.environ.get("CI"):
        pytest.skip("this machine lets no user make a mount namespace (unshare)")
    folder = tmp_path_factory.mktemp("disks")
    (folder / "disk").mkdir()
    (folder / "results").mkdir()
    with Nursery(folder, own_mounts=True) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def whole(nursery):
    life = nursery.live(*RUN, *SAME, "name=whole")
    assert life.status == 0, life.output
    return nursery.folder / "runs/whole"


def mount(nursery, options, *, again=False):
    how = ["-o", f"remount,{options}"] if again else ["-t", "tmpfs", "-o", options, "tmpfs"]
    nursery.run("mount", *how, nursery.folder / "disk")


@pytest.fixture
def disk(nursery):
    yield nursery.folder / "disk"
    nursery.run("umount", nursery.folder / "disk")


def test_a_disk_that_fills_while_a_checkpoint_is_written(nursery, whole, disk):
    mount(nursery, "size=36m")  # two checkpoints of 14 MB fit, the third does not before the first is removed
    run = [*RUN, *SAME, "name=full"]
    life = nursery.live(*run, cwd=disk)
    assert life.status == 3, life.output
    assert "rlpost: checkpoint: got" in life.output and "free space, then run the same command to resume" in life.output
    assert "step 6/12" in life.output and "Traceback" not in life.output
    life = nursery.live(*run, cwd=disk)
    assert life.status == 3 and "resumed after step 4" in life.output, "still full: still clear, still resumable"
    mount(nursery, "size=200m", again=True)
    life = nursery.live(*run, cwd=disk)
    assert life.status == 0 and "resumed after step 4" in life.output, life.output
    nursery.run("cp", "-r", disk / "runs/full", nursery.folder / "results/full")
    assert_the_same_run(nursery.folder / "results/full", whole)

    # The same disk, now read-only: a run of another name cannot begin, and says so before anything else.
    mount(nursery, "ro", again=True)
    life = nursery.live(*RUN, "name=other", cwd=disk)
    assert life.status == 3 and "run directory: got" in life.output and "Read-only file system" in life.output
    assert "device cpu" not in life.output and "Traceback" not in life.output


def test_a_disk_that_fills_under_the_ledger(nursery, whole, disk):
    mount(nursery, "size=200k")
    run = [*RUN, *SAME, "name=ledger", f"ledger_dir={disk}"]
    life = nursery.live(*run)
    assert life.status == 3, life.output
    assert (
        "ledger (cannot write): got" in life.output and "free space" in life.output and "Traceback" not in life.output
    )
    mount(nursery, "size=20m", again=True)
    life = nursery.live(*run)
    assert life.status == 0, life.output
    folder = nursery.folder / "runs/ledger"
    nursery.run("cp", (folder / "ledger.location").read_text().strip(), folder / "ledger.sqlite")
    assert_the_same_run(folder, whole)

"""On the machines where a run has workers only, too, nothing is left when its controller ends. Real Ray, two nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.own_process

CONTROLLER = """
import sys, time
from pathlib import Path
import ray
from rlpost.workers.cluster.cleanup import Guardians
ray.init(address=sys.argv[1], log_to_driver=False)
guardians = Guardians([Path(sys.argv[2])])
guardians.cover(node["NodeID"] for node in ray.nodes())
guardians.cover(node["NodeID"] for node in ray.nodes())  # as a recovery does
print("covered", len(guardians._of_node), flush=True)
if sys.argv[3] == "sweep":
    guardians.clean_up()
    print("swept", Path(sys.argv[2]).exists(), flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def address():
    from ray.cluster_utils import Cluster

    nodes = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=nodes)
    del nodes["include_dashboard"]
    cluster.add_node(**nodes)
    yield cluster.address
    cluster.shutdown()


def start(address: str, folder: Path, end: str) -> subprocess.Popen[str]:
    folder.mkdir()
    command = [sys.executable, "-c", CONTROLLER, address, str(folder), end]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_one_guardian_on_each_other_node_sweeps_at_the_end_and_where_the_controller_is_killed(
    address: str, tmp_path: Path
) -> None:
    killed, swept = start(address, tmp_path / "killed-1", "wait"), start(address, tmp_path / "swept-1", "sweep")
    try:
        assert lines_of(killed) == lines_of(swept) == "covered 1\n", "the controller's own node needs none"
        assert lines_of(swept) == "swept False\n"
        assert (tmp_path / "killed-1").exists()
        os.kill(killed.pid, signal.SIGKILL)
        deadline = time.monotonic() + 40
        while (tmp_path / "killed-1").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not (tmp_path / "killed-1").exists()
    finally:
        for process in (killed, swept):
            process.kill()

"""A run on two Ray workers, with real Ray, vLLM and DeepSpeed: it trains, survives losses of each kind, leaves nothing.

One run takes three losses, one of each kind: a worker killed while it generates, one killed in the update, and one that
hangs. Another loses its controller, goes on by the same command, then loses a worker where no state was kept outside,
and goes back to its checkpoint. The long form kills at random, fifty times.
"""

from __future__ import annotations

import os
import random
import re
import signal
from pathlib import Path

import pytest

from tests.e2e.account import assert_nothing_lost
from tests.e2e.cluster import CLUSTER, RUN, Place, eventually, run_and_strike, strike_at_random
from tests.e2e.program import rlpost

PROMPTS = 18  # a run goes through them more than once
DATA = [f"data.train.limit={PROMPTS}", "eval.every=4"]
GONE_S = 40.0  # after a controller's SIGKILL: the last sweep comes after 20 s


@pytest.fixture
def place(tmp_path: Path):
    with Place(tmp_path) as place:
        yield place


def check_account(place: Place, steps: int, run: Path = RUN) -> None:
    """Every step trained once, whole groups, no draw skipped, no sample twice, and a ledger that adds up."""
    assert_nothing_lost(place.folder / run, steps=steps, samples=16, prompts=PROMPTS, eval_every=4)
    assert "trained" in rlpost("buffer", str(run), cwd=place.folder)


def check_nothing_is_left(place: Place, seconds: float = 15.0, run: Path = RUN) -> None:
    assert eventually(lambda: not place.traces(run), seconds), place.traces(run)


def test_a_run_survives_a_death_in_generation_one_in_the_update_and_a_hang(place: Place) -> None:
    strikes = [("generate", signal.SIGKILL), ("update", signal.SIGKILL), ("generate", signal.SIGSTOP)]
    output, assassin = run_and_strike(place, "steps=8", *DATA, strikes=strikes)
    assert assassin.struck == strikes, output
    assert output.count("restarting all workers") == 3, output
    assert "died in phase 'update'" in output and re.search("no heartbeat for .* s in phase|did not end its", output)
    assert "restarts from its latest checkpoint" not in output, "the state was kept: no finished step is made again"
    assert "Traceback" not in output and "Unhandled error" not in output, "what is survived needs no trace"
    check_account(place, 8)
    check_nothing_is_left(place)


def test_a_killed_controller_is_resumed_and_without_a_kept_state_the_run_goes_back_to_its_checkpoint(
    place: Place,
) -> None:
    """And without shared storage: every checkpoint, and the model, comes from the workers' own folders and back."""
    scratch = place.folder / "scratch"
    scratch.mkdir()
    apart = ["cluster.shared_storage=false", f"cluster.scratch_dir={scratch}"]
    run = ["steps=4", "checkpoint.every=2", "cluster.keep_shards=false", *apart, *DATA]
    process = place.start(*run)
    reached = eventually(lambda: place.is_at("generate", 2), 300)
    process.kill()
    assert reached, process.communicate()[0]
    check_nothing_is_left(place, GONE_S)
    output, assassin = run_and_strike(place, *run, strikes=[("update", signal.SIGKILL)])
    assert assassin.struck and "resumed after step 2" in output, output
    assert "restarts from its latest checkpoint" in output, output
    check_account(place, 4)
    assert (place.folder / RUN / "model" / "model.safetensors").is_file()
    check_nothing_is_left(place)
    assert not list(scratch.iterdir())


def test_ctrl_c_saves_and_leaves_nothing_behind(place: Place) -> None:
    process = place.start("steps=1000")
    try:
        assert eventually(lambda: place.status().get("step", 0) >= 1, 120)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "the same command resumes from there" in output
    check_nothing_is_left(place)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_two_machines_that_share_nothing_a_lost_worker_costs_no_step_and_nothing_is_left(place: Place) -> None:
    """Two nodes of a Ray that was there before, each with folders of its own. Then the controller is killed."""
    from ray.cluster_utils import Cluster

    scratch = place.folder / "scratch"
    scratch.mkdir()
    node = {"num_cpus": 1, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        run = ["steps=4", "checkpoint.every=2", f"cluster.address={cluster.address}", *DATA]
        run += ["cluster.shared_storage=false", f"cluster.scratch_dir={scratch}"]
        process = place.start(*run, log=place.folder / "log")
        try:
            assert eventually(lambda: place.is_at("update", 1), 300)
            os.kill(place.status()["workers"][1]["pid"], signal.SIGKILL)
            assert eventually(lambda: place.is_at("generate", 3), 300), (place.folder / "log").read_text()
            assert len([*Path("/dev/shm").glob(f"{place.kept().name.rpartition('-')[0]}-*/*/")]) == 2, "one for each"
        finally:
            process.kill()
        assert eventually(lambda: not place.left_outside() and not list(scratch.iterdir()), GONE_S)
        output = rlpost(*CLUSTER, *run, cwd=place.folder)
    finally:
        cluster.shutdown()
    log = (place.folder / "log").read_text()
    assert "workers are back" in log and "restarts from its latest checkpoint" not in log, log
    assert "resumed after step 2" in output, output
    check_account(place, 4)
    assert not place.left_outside() and not list(scratch.iterdir())


@pytest.mark.parametrize("setting", ["cluster.address=127.0.0.1:1"])
def test_a_cluster_that_is_not_there_is_a_clear_error(tmp_path: Path, setting: str) -> None:
    output = rlpost(*CLUSTER, setting, cwd=tmp_path, expect=3)
    assert "cluster.address" in output and "ray start --head" in output


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number, steps", [(50, 40)])
def test_killed_at_random_instants_it_ends_with_a_correct_ledger(place: Place, number: int, steps: int) -> None:
    """Workers in any phase, the controller now and then, which the same command resumes."""
    seed = random.randrange(1 << 30)
    settings = [f"steps={steps}", "checkpoint.every=3", "cluster.max_recoveries=1000", "cluster.hang_s=60", *DATA]
    runs, blows = strike_at_random(place, number, seed, settings)
    print(f"seed {seed}, {len(runs)} runs: {', '.join(blows)}")
    for name in runs:
        check_account(place, steps, Path("runs") / name)
        check_nothing_is_left(place, GONE_S, Path("runs") / name)

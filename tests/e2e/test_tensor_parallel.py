"""A run whose one engine spans two Ray workers, real Ray, vLLM and DeepSpeed: it trains, and survives its members."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.e2e.account import assert_nothing_lost
from tests.e2e.cluster import RUN, Place, eventually, run_and_strike
from tests.e2e.program import steps_of
from tests.e2e.test_cluster import DATA, PROMPTS, check_account, check_nothing_is_left

ONE_ENGINE = ["cluster.num_workers=2", "engine.tensor_parallel=2"]


@pytest.fixture
def place(tmp_path: Path):
    with Place(tmp_path) as place:
        yield place


def shared_memory() -> set[str]:
    """vLLM's, which nothing removes where a member is killed."""
    return {p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(("psm_", "-tp"))}


def test_two_workers_train_with_one_engine(place: Place) -> None:
    """Each step's publication is checked at both members: every part bit for bit, and the canary's logprobs."""
    before = shared_memory()
    run_and_strike(place, *ONE_ENGINE, "steps=2", *DATA, "eval.every=2", strikes=[])
    assert_nothing_lost(place.folder / RUN, steps=2, samples=16, prompts=PROMPTS, eval_every=2)
    rows = steps_of(place.folder / RUN)
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["mismatch/canary"] <= 1e-5
        # a step that trains only groups begun earlier has no token of the current version
        assert row.get("mismatch/lag_0/abs_log_ratio", 0.0) <= 1e-4
    assert "mismatch/lag_0/abs_log_ratio" in rows[0]
    assert eventually(lambda: shared_memory() <= before)
    check_nothing_is_left(place)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_engine_that_loses_a_member_is_built_anew(place: Place) -> None:
    """No engine is left in each of these: a death while generating, one in the update, a member that hangs."""
    before = shared_memory()
    strikes = [("generate", signal.SIGKILL), ("update", signal.SIGKILL), ("generate", signal.SIGSTOP)]
    settings = [*ONE_ENGINE, "steps=8", "cluster.hang_s=20", *DATA]
    output, assassin = run_and_strike(place, *settings, strikes=strikes, timeout_s=1700)
    assert assassin.struck == strikes, output
    assert output.count("restarting all workers") == 3, output
    assert "died in phase 'update'" in output and re.search("no heartbeat for .* s in phase|did not end its", output)
    check_account(place, 8)
    assert eventually(lambda: shared_memory() <= before)
    check_nothing_is_left(place)

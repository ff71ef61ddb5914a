"""A run whose one engine spans two Ray workers, real Ray, vLLM and DeepSpeed: it trains, and survives its members."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.e2e.program import rlpost, steps_of
from tests.e2e.test_cluster import CLUSTER, RUN, check_account, eventually, left_behind, run_and_strike

QUEUES = set(Path("/dev/shm").glob("psm_*"))  # before any test: vLLM's message queues between an engine's members
ONE_ENGINE = ["cluster.num_workers=2", "engine.tensor_parallel=2"]


def test_two_workers_train_with_one_engine(tmp_path: Path) -> None:
    """Each step's publication is checked at both members: every part bit for bit, and the canary's logprobs."""
    output = rlpost(*CLUSTER, *ONE_ENGINE, "steps=2", "eval.every=-1", cwd=tmp_path)
    assert "Done: 2 steps" in output, output
    check_account(tmp_path, 2)
    for row in steps_of(tmp_path / RUN):
        assert 0 < row["mismatch/canary"] <= 1e-4
        assert row["mismatch/lag_0/abs_log_ratio"] <= 1e-4
    assert eventually(lambda: set(Path("/dev/shm").glob("psm_*")) <= QUEUES)
    assert eventually(lambda: not left_behind()), left_behind()


@pytest.mark.slow
def test_an_engine_that_loses_a_member_is_built_anew(tmp_path: Path) -> None:
    """No engine is left in each of these: a death while generating, one in the update, a member that hangs."""
    strikes = [("generate", signal.SIGKILL), ("update", signal.SIGKILL), ("generate", signal.SIGSTOP)]
    arguments = (*ONE_ENGINE, "steps=8", "cluster.hang_s=20")
    output, assassin = run_and_strike(tmp_path, *arguments, strikes=strikes)
    assert assassin.struck == strikes, output
    assert output.count("workers are started anew") == 3, output
    assert "died in phase 'update'" in output and re.search("no sign of life for .* s in phase|did not end its", output)
    check_account(tmp_path, 8)
    assert eventually(lambda: set(Path("/dev/shm").glob("psm_*")) <= QUEUES)
    assert eventually(lambda: not left_behind()), left_behind()

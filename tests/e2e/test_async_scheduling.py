"""A run with asynchronous scheduling, vLLM's default on a GPU: an abort drops a batch, and nothing recorded is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .account import assert_nothing_lost
from .program import SMALL, TIMEOUT_S, on_cpu, rollouts_of, steps_of

STEPS = 4


@pytest.mark.parametrize("keep_kv", [False, True], ids=["replayed", "kept"])
def test_a_run_accounts_for_every_token_that_was_handed_over(tmp_path: Path, keep_kv: bool) -> None:
    keys = ["recipe=math/arithmetic", *SMALL, f"steps={STEPS}", "name=run", "eval.every=2", "checkpoint.every=2"]
    command = [sys.executable, "-m", "tests.e2e.async_program", *on_cpu(["train", *keys]), f"rollout.keep_kv={keep_kv}"]
    command.append(f"runs_dir={tmp_path}")
    top = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=top, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    assert_nothing_lost(run, steps=STEPS, samples=16, prompts=8000, eval_every=2)
    rows = steps_of(run)
    assert max(row["mismatch/lag_0/abs_log_ratio"] for row in rows) < 1e-6, "tokens and logprobs belong together"
    mixed = [row["mismatch/mixed_kv/abs_log_ratio"] for row in rows if "mismatch/mixed_kv/abs_log_ratio" in row]
    assert bool(mixed) == keep_kv and max(mixed, default=0.0) < 1e-2, "a token of a batch under way was left out"
    spans = [len(set(sample["policy_versions"])) for samples in rollouts_of(run).values() for sample in samples]
    assert max(spans) > 1, "no response was carried over"
    carried = "kept" if keep_kv else "resumed"
    assert sum(row[f"rollout/{carried}_samples"] for row in rows) > 0

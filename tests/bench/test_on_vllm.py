"""``rlpost bench rollout`` on the real engine, through the command; a process of its own, as it starts vLLM."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.own_process


def test_the_command_measures_the_real_engine(tmp_path):
    command = [sys.executable, "-m", "rlpost", "bench", "rollout", "recipe=math/arithmetic", "device=cpu"]
    command += ["rollout.groups_per_step=4", "rollout.samples_per_group=4", "engine.max_slots=8"]
    command += ["rollout.max_response_tokens=64", "--engines", "vllm", "--lengths", "lognormal"]
    command += ["--steps", "6", "--warm-up", "2", "--repeats", "1", "-o", str(tmp_path)]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert done.returncode == 0, done.stderr
    results = {r["strategy"]: r["figures"][0] for r in json.loads((tmp_path / "results.json").read_text())["results"]}
    saturated, synchronous, ours = (results[name] for name in ("saturated", "synchronous", "ours"))
    assert saturated["idle_share"] == 0 and ours["idle_share"] <= 0.03, "a slot stood empty"
    assert ours["tokens_per_iteration"] >= 0.9 * saturated["tokens_per_iteration"], "full slots, but slow"
    assert ours["consumed_tokens_per_s"] > 0 and synchronous["tokens_per_iteration"] < ours["tokens_per_iteration"]
    assert synchronous["idle_share"] > 0.2, "lengths without a tail prove nothing"
    assert ours["replayed_tokens"] > 0 and ours["staleness_max"] <= 4 and ours["discarded_share"] == 0
    keeping = results["ours, keep_kv"]
    assert keeping["replayed_tokens"] == 0 and keeping["idle_share"] <= 0.03 and keeping["carried_share"] > 0
    assert "of saturated" in done.stdout

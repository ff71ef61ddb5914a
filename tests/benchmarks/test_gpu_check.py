"""All stages of ``make gpu-check`` on the CPU, with tiny shapes: the real engine, trainer and command.

No other test sees ``benchmarks/gpu`` at work, and the machine that it is for is rarely at hand.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.stages import PARTS

# It starts eleven programs, one after another: two minutes of one core, and many more of wall time on a busy machine.
pytestmark = [pytest.mark.own_process, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
SKIPPED = {
    "1-canary-tf32": "only a GPU has TF32",
    "6-update-0.6b": "small",
    "7-decode-0.6b": "small",
    "8-zero3-fused": "FusedAdam needs a GPU",
}
# Of each part that is not skipped: figures that it must report, all of them finite.
FIGURES = {
    "0-machine": ["copied_gb", "pin_s", "to_device_gb_s", "to_host_gb_s", "ram_free_gb"],
    "1-canary-ieee": ["canary_max_nats", "publish_s", "start_s"],
    "2-contract": [
        "rollout_score_mean_nats",
        "score_trainer_mean_nats",
        "same_seed_equal_share",
        "resumed_equal_share",
    ],
    "3-demo": ["mismatch_lag_0_nats", "canary_max_nats", "first_step_s", "later_step_s", "run_s"],
    "5-colocation": ["copy0_gb_s", "copy1_gb_s", "engine_s", "states_off_s", "states_on_s", "logprobs_moved_nats"],
    "6-update-large": ["2x64_split_s", "2x64_slices_tflop_s", "3_lengths_slices_gradient_difference", "update_s"],
    "7-decode-large": ["slots8_tok_s", "slots16_step_ms", "slots16_rlpost_host_ms", "slots16_rlpost_share"],
    "4-keep-kv-slots": ["slots", "kv_tokens", "waiting_max"],
    "4-keep-kv-full": ["slots", "kv_tokens", "waiting_max"],
    "8-zero3-adamw": ["offload_s", "reload_s", "save_s", "load_s"],
    "9-caches": ["vllm_mib", "inductor_mib", "triton_mib"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = tmp_path_factory.mktemp("check") / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--minutes", "120"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=1750)
    return done, json.loads(out.read_text())


def test_every_stage_passes_or_says_why_it_cannot_apply(run: Any) -> None:
    done, facts = run
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [part.label for part in PARTS]
    for line, stage in zip(lines[:-1], facts["stages"], strict=True):
        label = f"{stage['stage']}-{stage['name']}"
        assert line.split()[:2] == [label, "SKIP" if label in SKIPPED else "PASS"], line
        assert stage["reason"] == SKIPPED.get(label)
    assert lines[-1].startswith(f"PASS={len(FIGURES)} FAIL=0 SKIP={len(SKIPPED)}")
    assert (facts["device"], facts["small"], facts["gpu"]) == ("cpu", True, None)


def test_every_stage_reports_its_figures(run: Any) -> None:
    _, facts = run
    figures = {f"{stage['stage']}-{stage['name']}": stage["figures"] for stage in facts["stages"]}
    for label, names in FIGURES.items():
        for name in names:
            assert math.isfinite(figures[label][name]), f"{label}: {name}"
    assert figures["2-contract"]["prefill_tokens_warm"] < figures["2-contract"]["prompt_tokens"]
    assert figures["3-demo"]["steps"] == 4 and figures["4-keep-kv-full"]["waiting_max"] > 0
    assert figures["5-colocation"]["logprobs_moved_nats"] > 0
    assert figures["6-update-large"]["2x64_slices_gradient_difference"] < 1e-4

"""The plan of the trainer's memory against a process's peak resident memory: the real ``train.deepspeed_trainer``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.trainer_memory import PHASES, SHAPE, configure, measure_apart, planned
from rlpost.models.shape import count_params

# Stage, dtype, dtype of the sums, offload of the optimizer.
CASES = [(1, "bfloat16", "bfloat16", False), (2, "bfloat16", "float32", False), (3, "bfloat16", "float32", False)]
MORE = [(stage, dtype, sums, True) for stage, dtype, sums, _ in CASES]
MORE += [(stage, "float32", "float32", offload) for stage in (1, 2, 3) for offload in (False, True)]
MORE += [(stage, "bfloat16", "bfloat16", offload) for stage in (2, 3) for offload in (False, True)]


@pytest.fixture(autouse=True)
def kernel_resets_peaks():
    try:
        Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the kernel does not reset a process's peak: {error}")


@pytest.mark.parametrize(
    ("stage", "dtype", "sums", "offload"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_the_plan_is_what_a_process_takes_within_a_tenth(stage, dtype, sums, offload):
    assert count_params(SHAPE) > 60_000_000
    case = {"stage": stage, "dtype": dtype, "sums": sums, "offload": offload}
    plan, measured = planned(configure(**case), SHAPE), measure_apart(case, SHAPE)
    for phase in PHASES:
        assert plan[phase] == pytest.approx(measured[phase], rel=0.1), f"{phase}, per parameter: {per(measured)}"
    assert max(plan.values()) == pytest.approx(max(measured.values()), rel=0.1)


def per(sizes: dict[str, int]) -> dict[str, float]:
    return {phase: round(size / count_params(SHAPE), 2) for phase, size in sizes.items()}

"""Parts of a step: nothing is counted twice, and what no part explains is ``other``."""

from dataclasses import replace

import pytest

from rlpost.engine.protocol import EngineStep
from rlpost.reporting.metric_names import REGISTRY
from rlpost.reporting.waterfall import PARTS, Stopwatch, of_publication, of_rollout, waterfall
from rlpost.rollout.stats import RolloutStats
from rlpost.workers.publication import Publication

PUBLICATION = Publication(
    policy_version=1,
    num_bytes=8,
    duration_s=2.0,
    load_s=0.75,
    fingerprint_s=0.25,
    canary_s=0.5,
    canary_mean=0.0,
    canary_max=0.0,
)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watch(clock):
    return Stopwatch(clock)


def test_part_inside_another_counts_for_itself_only(watch, clock):
    clock.now = 5.0  # before the first part: nobody's
    with watch.part("build_batch"):
        clock.now += 1.0
        with watch.part("train"):
            clock.now += 4.0
        clock.now += 2.0
    clock.now += 7.0
    with watch.part("train"):
        clock.now += 0.5
    assert watch.take() == {"build_batch": 3.0, "train": 4.5}
    assert watch.take() == {}


def test_part_that_raises_is_counted_and_closed(watch, clock):
    with pytest.raises(ValueError, match="x"), watch.part("train"):
        clock.now += 1.0
        raise ValueError("x")
    clock.now += 1.0
    assert watch.take() == {"train": 1.0}


def test_taking_in_the_middle_of_a_part_leaves_the_rest_for_the_next(watch, clock):
    with watch.part("record"):
        clock.now += 1.0
        assert watch.take() == {"record": 1.0}
        clock.now += 2.0
    assert watch.take() == {"record": 2.0}


def test_what_a_publication_does_not_explain_is_handing_over():
    assert of_publication(PUBLICATION) == {"canary": 0.5, "copy": 0.75, "fingerprint": 0.25, "hand_over": 0.5}


def test_rollout_divides_into_work_idle_places_own_code_waiting_and_the_end():
    stats = RolloutStats(step=1, slots=4, started_s=10.0, ended_s=20.0, abort_s=0.5)
    for busy, running in ((4.0, 4), (3.0, 2)):  # half a second of our own each
        stats.work.add_step(
            busy + 0.5, EngineStep(deltas=(), duration_s=busy, num_running=running, num_prefill_tokens=0)
        )
    # 8 s of loop, 7 in the engine; idle share 1 - (4.5 x 4 + 3.5 x 2) / (8 x 4) = 7 / 32
    assert of_rollout(stats, ledger_s=0.25) == pytest.approx(
        {"engine": 7 * 25 / 32, "idle": 7 * 7 / 32, "collect": 0.75, "wait_for_rewards": 1.5, "abort": 0.5}
    )


def test_parts_add_up_to_the_step_in_their_order():
    found = waterfall(9.0, of_publication(PUBLICATION), {"train": 3.0, "ledger": 0.5}, {"ledger": 0.5})
    assert sum(found.values()) == 9.0
    assert found["waterfall/ledger"] == 1.0
    assert found["waterfall/other"] == 3.0
    assert list(found) == [f"waterfall/{name}" for name in PARTS if f"waterfall/{name}" in found]
    assert "waterfall/idle" not in found


def test_part_without_a_name_is_refused():
    with pytest.raises(AssertionError, match="tidying"):
        waterfall(1.0, {"tidying": 0.5})


def test_every_part_is_explained():
    assert {f"waterfall/{name}" for name in PARTS} == {m.name for m in REGISTRY if m.name.startswith("waterfall/")}


def test_slow_publication_cannot_make_a_part_negative():
    assert of_publication(replace(PUBLICATION, duration_s=1.0))["hand_over"] == 0.0

"""A plan is held to runs whose truth is known: predicted from one configuration, compared with another's run."""

import statistics

import pytest

from rlpost.plan.predict import make_plan
from rlpost.plan.recording import read_recording
from rlpost.plan.request import Request
from tests.plan.recorded import PROMPT_TOKENS, TRUTH, TWO_WORKERS, configure, record

STEPS = 40
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one(folder):
    return record(folder / "one", [], steps=STEPS)


@pytest.fixture(scope="module")
def two(folder):
    return record(folder / "two", TWO_WORKERS, steps=STEPS)


def plan(run, *overrides, **request):
    cfg = configure(*overrides)
    wanted = {"ratios": [cfg.rollout.oversample], "steps": 80, "repeats": 0} | request
    return make_plan(cfg, Request(recording=run, **wanted))


def mean(steps, name):
    return statistics.fmean(getattr(step, name) for step in steps)


def check(row, run, tolerance=TOLERANCE):
    """A predicted row against the steps of the run that was made with its configuration."""
    steps = read_recording(run, warm_up=6).steps
    assert row.step_s == pytest.approx(mean(steps, "step_s"), rel=tolerance)
    for name in ("generate_s", "update_s"):
        assert getattr(row, name) == pytest.approx(mean(steps, name), rel=1.5 * tolerance), name
    assert row.publish_s == pytest.approx(TRUTH.publish_s) and row.other_s == pytest.approx(TRUTH.other_s)
    assert row.idle_share == pytest.approx(mean(steps, "idle_share"), abs=0.03)


def test_costs_are_found_again(one):
    costs = plan(one, steps=5).costs
    assert costs.iteration_s == pytest.approx(TRUTH.engine.base_s, rel=0.02)
    assert costs.sample_s == pytest.approx(TRUTH.engine.sample_s, rel=0.02)
    assert costs.prefill_s == pytest.approx(TRUTH.engine.prefill_s, rel=0.05)
    assert costs.rollout_s == pytest.approx(TRUTH.rollout_s, rel=0.1)
    assert costs.update_s == pytest.approx(TRUTH.update_s, rel=0.01)
    assert costs.update_token_s == pytest.approx(TRUTH.update_token_s, rel=0.01)
    assert costs.prompt_tokens == pytest.approx(PROMPT_TOKENS, rel=1e-9)


@pytest.mark.parametrize(
    "other",
    [
        [],
        ["rollout.oversample=1.0"],
        ["engine.max_slots=32"],
        ["rollout.groups_per_step=12", "rollout.samples_per_group=3", "rollout.oversample=1.5"],
    ],
    ids=lambda other: " ".join(other) or "as it was",
)
def test_a_step_of_another_configuration_is_predicted(one, folder, other):
    truth = record(folder / ("truth " + " ".join(other)), other, steps=STEPS)
    check(plan(one, *other).rows[0], truth)


@pytest.mark.parametrize("workers", [2, 4])
def test_a_step_on_other_workers_is_predicted(two, folder, workers):
    other = [*TWO_WORKERS, f"cluster.num_workers={workers}"]
    truth = record(folder / f"{workers} workers", other, steps=STEPS)
    made = plan(two, *other)
    check(made.rows[0], truth)
    assert bool(made.extrapolated) == (workers > 2)


def test_synchronous_rollouts_on_two_workers_are_predicted(two, folder):
    other = [*TWO_WORKERS, "rollout.oversample=1.0"]
    check(plan(two, *other).rows[0], record(folder / "synchronous", other, steps=STEPS))


def test_groups_that_a_filter_drops_cost_their_generation(folder):
    run = record(folder / "filtered", [], steps=STEPS, drop=True)
    check(plan(run).rows[0], run)
    truth = record(folder / "filtered, synchronous", ["rollout.oversample=1.0"], steps=STEPS, drop=True)
    check(plan(run, "rollout.oversample=1.0").rows[0], truth, tolerance=0.03)


def test_a_kv_cache_that_held_fewer_samples_is_the_limit_again(folder):
    run = record(folder / "small cache", [], steps=STEPS, kv_slots=10)
    made = plan(run, "rollout.oversample=1.0")
    truth = record(folder / "small cache, synchronous", ["rollout.oversample=1.0"], steps=STEPS, kv_slots=10)
    check(made.rows[0], truth)
    assert made.extrapolated == ["the run's KV cache held 10 samples at once; that is used as the limit again"]


def test_steps_that_find_their_groups_complete_generate_nothing_and_idle_nothing(folder):
    """One group a step, of which many finish together: some steps begin with a complete one."""
    other = ["rollout.groups_per_step=1", "rollout.oversample=4", "cluster=ray", "cluster.exchange_s=1"]
    run = record(folder / "ready", other, steps=STEPS)
    assert min(step.generate_s for step in read_recording(run, warm_up=6).steps) == pytest.approx(TRUTH.rollout_s)
    (row,) = plan(run, *other).rows
    assert 0 < row.idle_share < 1

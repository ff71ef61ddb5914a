"""The comparison with TRL: both sides are set up from one configuration, and its figures are read and made right.

TRL itself is not installed here: ``make peers`` runs it, in an environment of its own.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.peers import run as run_module
from benchmarks.peers import settings
from benchmarks.peers.figures import generating_share, rate, samples_to, seconds_to, spread, summarize, to_markdown
from benchmarks.peers.records import Clock, Evaluation, Run, Step, Time, read_run, read_trl_log
from rlpost.train.lr_schedule import lr_at

FIXTURE = Path(__file__).parent / "trl_log_history.json"


@pytest.fixture(scope="module")
def default() -> dict[str, object]:
    return settings.trl_arguments(settings.load(seed=0, own=[], overrides=[]))


def at(wall_s: float, cpu_s: float = 0.0) -> Time:
    return Time(wall_s=wall_s, cpu_s=cpu_s)


def make_run(name: str, seed: int, step_s: float, accuracies: list[float]) -> Run:
    """Steps of ``step_s`` and 256 samples of 10 tokens, an evaluation every 2; CPU time is half the wall's."""
    steps = [
        Step(step=n, time=at(n * step_s, n * step_s / 2), samples=256, tokens=2560, reward=0.5, generate_s=0.25)
        for n in range(1, 2 * len(accuracies) - 1)
    ]
    evaluations = [
        Evaluation(step=2 * n, time=at(2 * n * step_s, n * step_s), accuracy=a) for n, a in enumerate(accuracies)
    ]
    return Run(name=name, seed=seed, start_s=7.0, steps=steps, evaluations=evaluations)


# ---- settings


@pytest.mark.parametrize(
    ("override", "argument", "value"),
    [
        ("rollout.samples_per_group=4", "num_generations", 4),
        ("rollout.groups_per_step=16", "generation_batch_size", 16 * 8),
        ("rollout.max_response_tokens=100", "max_completion_length", 100),
        ("rollout.temperature=0.8", "temperature", 0.8),
        ("train.lr=3e-5", "learning_rate", 3e-5),
        ("train.betas=[0.8,0.95]", "adam_beta1", 0.8),
        ("train.betas=[0.8,0.95]", "adam_beta2", 0.95),
        ("train.eps=1e-7", "adam_epsilon", 1e-7),
        ("train.weight_decay=0.1", "weight_decay", 0.1),
        ("train.grad_clip=0.5", "max_grad_norm", 0.5),
        ("train.epochs=2", "num_iterations", 2),
        ("algo.clip_low=0.1", "epsilon", 0.1),
        ("algo.clip_high=0.3", "epsilon_high", 0.3),
        ("algo.kl_coef=0.04", "beta", 0.04),
        ("algo.reduction=token_mean", "loss_type", "dapo"),
        ("steps=7", "max_steps", 7),
    ],
)
def test_an_argument_of_trl_follows_our_configuration(
    default: dict[str, object], override: str, argument: str, value: object
) -> None:
    changed = settings.trl_arguments(settings.load(seed=0, own=[], overrides=[override]))
    assert default[argument] != value, "the override changes nothing: the test could not fail"
    assert changed[argument] == value


def test_the_batch_is_one_optimizer_step_and_trl_asks_for_no_other_work() -> None:
    cfg = settings.load(seed=3, own=[], overrides=[])
    arguments = settings.trl_arguments(cfg)
    best = settings.TRL_BEST
    assert (
        best["per_device_train_batch_size"] * best["gradient_accumulation_steps"] == arguments["generation_batch_size"]
    )
    assert arguments["seed"] == cfg.seed == 3
    assert arguments["loss_type"] == "grpo", "the recipe's reduction is the mean of sequence means"
    assert not set(best) & set(arguments), "what is read off the configuration is not set a second time"


@pytest.mark.parametrize(
    "override", ["rollout=sync", "rollout.keep_kv=true", "algo.correction=none", "name=x", "logging.progress=quiet"]
)
def test_what_is_ours_alone_may_be_set(default: dict[str, object], override: str) -> None:
    assert settings.trl_arguments(settings.load(seed=0, own=[], overrides=[override])) == default


def test_our_rows_differ_from_each_other_in_how_they_roll_out_alone() -> None:
    ours = settings.load(seed=0, own=settings.OURS["rlpost"], overrides=[])
    synchronous = settings.load(seed=0, own=settings.OURS["rlpost, synchronous"], overrides=[])
    assert ours.rollout.oversample > 1 and synchronous.rollout.oversample == 1.0
    assert replace(synchronous, rollout=ours.rollout) == ours
    kept = dict(oversample=2.0, max_staleness=4)
    assert replace(synchronous.rollout, **kept) == replace(ours.rollout, **kept)


def test_the_learning_rate_is_our_schedule() -> None:
    cfg = settings.load(seed=0, own=[], overrides=["steps=10"])
    factors = [settings.lr_factor(cfg, step) for step in range(10)]
    assert factors[:2] == [0.5, 1.0], "two steps of warm-up, the first of which trains"
    last = lr_at(9, peak=1.0, schedule="cosine", warmup_steps=2, total_steps=10, final_share=0.1)
    assert factors[-1] == pytest.approx(last)


@pytest.mark.parametrize(
    "override",
    ["algo.advantage=rloo", "algo.advantage_eps=1e-6", "algo.loss=gspo", "algo.dual_clip=3.0", "algo=dapo"]
    + ["train.optimizer_steps_per_rollout=2", "reward.function=gsm8k", "algo.reduction=constant_length"]
    + ["model.dtype=bfloat16", "engine.prefix_caching=false", "engine.kv_cache_bytes=100000000", "threads=2"]
    + ["rollout.stop_token_ids=[3]", "rollout.max_in_flight=8", "algo.kl_estimator=k1", "train.zero_stage=2"],
)
def test_what_trl_cannot_be_asked_for_is_refused(override: str) -> None:
    with pytest.raises(ValueError, match="got .*; expected"):
        settings.trl_arguments(settings.load(seed=0, own=[], overrides=[override]))


def test_a_finished_run_stands_for_its_settings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        made.append(command)
        facts = {"settings": settings.all_of(["steps=4"])}
        replace(make_run("TRL", 0, 1.0, [0.5, 0.9]), facts=facts).write(tmp_path / "trl-0.json")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run_module.subprocess, "run", run)
    for _ in range(2):
        assert run_module.one_run("TRL", 0, tmp_path, 0, ["steps=4"]).name == "TRL"
    assert len(made) == 1 and "benchmarks.peers.train_trl" in made[0]
    monkeypatch.setattr(settings, "COMMON", [*settings.COMMON, "eval.every=4"])
    run_module.one_run("TRL", 0, tmp_path, 0, ["steps=4"])
    assert len(made) == 2, "the comparison is another now"


# ---- reading


def test_the_log_of_a_real_run_of_trl_is_read() -> None:
    history = json.loads(FIXTURE.read_text())
    steps = read_trl_log(history, [at(1.0), at(2.5)], [0.3, 0.4], samples=256)
    assert [step.step for step in steps] == [1, 2]
    assert [step.time.wall_s for step in steps] == [1.0, 2.5]
    assert [step.generate_s for step in steps] == [0.3, 0.4]
    assert [step.samples for step in steps] == [256, 256]
    assert [step.tokens for step in steps] == [6101, 6478], "mean_length times samples, a whole number"
    assert [step.reward for step in steps] == pytest.approx([156 / 256, 143 / 256])


def test_a_step_that_trl_did_not_log_is_refused() -> None:
    history = json.loads(FIXTURE.read_text())
    with pytest.raises(ValueError, match="expected 1 to 3"):
        read_trl_log(history, [at(1.0), at(2.0), at(3.0)], [0.1, 0.1, 0.1], samples=256)


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = make_run("TRL", 1, 2.0, [0.5, 0.9])
    run.write(tmp_path / "run.json")
    assert read_run(tmp_path / "run.json") == run


# ---- figures


def test_time_to_an_accuracy_runs_linearly_between_two_evaluations() -> None:
    run = make_run("x", 0, 3.0, [0.5, 0.8, 0.9, 0.7, 0.95])
    assert seconds_to(run, 0.85, "wall_s") == pytest.approx(6.0 + 3.0), "half way from the evaluation at 6 s to 12 s"
    assert seconds_to(run, 0.85, "cpu_s") == pytest.approx(4.5)
    assert samples_to(run, 0.85) == pytest.approx(3 * 256)
    assert seconds_to(run, 0.5, "wall_s") == 0.0
    assert seconds_to(run, 0.96, "wall_s") is None


def test_rates_leave_out_the_first_step() -> None:
    run = make_run("x", 0, 2.0, [0.5, 0.6, 0.7])
    first = replace(run.steps[0], time=at(1.0), samples=10_000)
    slow = replace(run, steps=[first, *run.steps[1:]])
    assert rate(slow, "samples", "wall_s") == pytest.approx(3 * 256 / 7.0)
    assert generating_share(slow) == pytest.approx(100 * 3 * 0.25 / 7.0)


def test_a_seed_that_does_not_get_there_counts_as_slowest() -> None:
    assert spread([3.0, None, 1.0]).median == 3.0
    assert spread([3.0, None, None]).median is None
    assert spread([3.0, None, 1.0]).text(1) == "3.0 (1.0 to not reached)"


def test_ratios_are_taken_seed_by_seed() -> None:
    runs = [make_run("rlpost", seed, 1.0 + seed, [0.5, 0.9]) for seed in range(3)]
    runs += [make_run("TRL", seed, 3.0 * (1.0 + seed), [0.5, 0.9]) for seed in range(3)]
    summary = summarize(runs, accuracy=0.85, baseline="TRL")
    ratios = summary["ratios"]["rlpost"]
    assert ratios["seconds_to"].values == pytest.approx([3.0] * 3)
    assert ratios["samples_per_s"].values == pytest.approx([3.0] * 3)
    assert summary["figures"]["TRL"]["seconds_to_with_start"].values[0] == pytest.approx(7.0 + 6.0 * 0.35 / 0.4)
    table = to_markdown(summary)
    assert "rlpost over TRL, seed by seed: 3.00 (3.00 to 3.00) x as fast to 85 % (3.00 of the median times" in table
    assert table.count("\n| ") == 3 - 1, "two rows below the heading"


def test_the_ratio_of_medians_is_not_the_median_of_ratios() -> None:
    """And a seed that did not get there counts as slowest in it."""
    times = {"rlpost": [1.0, 2.0, 3.0], "TRL": [9.0, 2.0, 3.0]}
    runs = [make_run(name, seed, s, [0.5, 0.9]) for name, all_s in times.items() for seed, s in enumerate(all_s)]
    summary = summarize(runs, accuracy=0.85, baseline="TRL")
    assert summary["ratios"]["rlpost"]["seconds_to"].median == pytest.approx(1.0)
    assert summary["of_medians"]["rlpost"] == pytest.approx(1.5)
    runs[0] = make_run("rlpost", 0, 1.0, [0.5, 0.6])
    assert summarize(runs, accuracy=0.85, baseline="TRL")["of_medians"]["rlpost"] == pytest.approx(1.0)
    runs[1] = make_run("rlpost", 1, 1.0, [0.5, 0.6])
    late = summarize(runs, accuracy=0.85, baseline="TRL")
    assert late["of_medians"]["rlpost"] is None and "(no ratio of the median times" in to_markdown(late)


def test_the_clock_stands_still_while_it_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"wall": 10.0, "cpu": 5.0}
    monkeypatch.setattr("time.perf_counter", lambda: now["wall"])
    monkeypatch.setattr("time.process_time", lambda: now["cpu"])
    clock = Clock()
    now.update(wall=12.0, cpu=6.0)
    with clock.paused():
        now.update(wall=20.0, cpu=9.0)
    now.update(wall=21.0, cpu=9.5)
    assert clock.read() == Time(wall_s=3.0, cpu_s=1.5)


def test_no_ratio_is_made_up_where_someone_did_not_get_there() -> None:
    """Seed 0: only TRL; seed 1: neither; seed 2: only ours, while TRL's 2 s were over; seed 3: both."""
    ours = [[0.5, 0.8], [0.5, 0.8], [0.5, 0.85], [0.5, 0.85]]
    theirs = [[0.5, 0.9], [0.5, 0.8], [0.5, 0.8], [0.5, 0.85]]
    runs = [make_run("rlpost", seed, 0.5, accuracies) for seed, accuracies in enumerate(ours)]
    runs += [make_run("TRL", seed, 2.0, accuracies) for seed, accuracies in enumerate(theirs)]
    summary = summarize(runs, accuracy=0.85, baseline="TRL")
    ratios = summary["ratios"]["rlpost"]["seconds_to"]
    length = runs[-1].steps[-1].time.wall_s
    assert ratios.values == pytest.approx((0.0, length / 1.0, 4.0)) and ratios.undecided == 1
    assert "(0.00 to 4.00; 1 of 4 seeds undecided) x as fast" in to_markdown(summary)

"""A run is killed everywhere and goes on as if nothing had happened; it stops in good order when it is asked to."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys

import pyarrow.parquet as parquet
import pytest

from rlpost.workers.canary import RESPONSE_TOKENS  # what an engine samples before the first publication, step by step

from . import account
from .account import LEDGER_TABLES, ledger_rows
from .lives import KILLED, Nursery, Place
from .program import SMALL, rollouts_of

STEPS, GROUPS, SAMPLES, PROMPTS = 12, 4, 4, 18
RUN = [
    "train",
    "recipe=math/arithmetic",
    f"steps={STEPS}",
    f"data.train.limit={PROMPTS}",  # the run goes through the data more than twice
    "checkpoint.every=2",
    "eval.every=4",
    *SMALL,
]
SAME = ["deterministic=true"]

# Every phase of a run, and every write of a checkpoint. ``nth`` lets each life get somewhere first.
PLACES = {
    "before the first step": Place("rlpost.workers.recovery:RecoveringWorkers.publish"),
    "copying the weights": Place("rlpost.engine.vllm:VLLMEngine.load_weights", "after", nth=2),
    "generating": Place("rlpost.engine.vllm:VLLMEngine.step", nth=RESPONSE_TOKENS + 60),
    "scoring": Place("rlpost.rewards.scoring:RewardScorer.submit", "after", nth=20),
    "between abort and store": Place("rlpost.rollout.buffer:RolloutBuffer.store", nth=3),
    "in the middle of the store": Place("rlpost.rollout.ledger:Ledger._insert_queued", "after", nth=3),
    "after the store": Place("rlpost.rollout.buffer:RolloutBuffer.store", "after", nth=2),
    "in the update": Place("rlpost.train.deepspeed_trainer:DeepSpeedTrainer._optimizer_step", nth=2),
    "between update and settling": Place("rlpost.rollout.buffer:RolloutBuffer.settle", nth=3),
    "after settling": Place("rlpost.rollout.buffer:RolloutBuffer.settle", "after", nth=2),
    "after the rollout file": Place("rlpost.reporting.metrics:MetricsWriter.log_rollouts", "after", nth=2),
    "writing a checkpoint: nothing yet": Place("rlpost.durable.checkpoint:remove_partial"),
    "writing a checkpoint: the trainer": Place("rlpost.train.deepspeed_trainer:DeepSpeedTrainer.save", "after"),
    "writing a checkpoint: in the ledger's copy": Place("rlpost.rollout.ledger:Ledger._copy_rows", "after"),
    "writing a checkpoint: the ledger's copy": Place("rlpost.rollout.ledger:Ledger.snapshot", "after"),
    "writing a checkpoint: the state": Place("rlpost.durable.run_state:write", "after"),
    "writing a checkpoint: the configuration": Place("rlpost.durable.run_state:write", "after", nth=2),
    "writing a checkpoint: the model's files": Place("rlpost.durable.run_state:save_model_files", "after"),
    "writing a checkpoint: the manifest": Place("rlpost.durable.checkpoint:write_manifest", "after"),
    "writing a checkpoint: on its way to the disk": Place("rlpost.durable.checkpoint:_sync", nth=3),
    "writing a checkpoint: before the rename": Place("rlpost.durable.checkpoint:_make_room"),
    "between rename and cleanup": Place("rlpost.durable.checkpoint:clean_up"),
    "in the cleanup": Place("rlpost.durable.checkpoint:_remove", "after"),
    "before the ledger is compacted": Place("rlpost.rollout.ledger:Ledger.compact", nth=2),
    "in the middle of compaction": Place("rlpost.rollout.ledger:Ledger._transaction", "end", nth=8),
    "evaluating": Place("rlpost.evaluation.evaluate:summarize"),
    "after evaluating": Place("rlpost.durable.history:History.add_evaluation", "after"),
    "making the ledger": Place("rlpost.rollout.ledger:Ledger._transaction", "end"),
    "rolling back": Place("rlpost.rollout.ledger:Ledger._transaction", "end"),
    "loading the trainer": Place("rlpost.train.deepspeed_trainer:DeepSpeedTrainer.load", "after"),
    "exporting the model": Place("rlpost.train.deepspeed_trainer:DeepSpeedTrainer.export", "after"),
    "before the last word": Place("rlpost.durable.run_dir:finish"),
}
IN_CI = [
    "generating",
    "between abort and store",
    "in the middle of the store",
    "scoring",
    "in the update",
    "between update and settling",
    "writing a checkpoint: the trainer",
    "writing a checkpoint: in the ledger's copy",
    "writing a checkpoint: the state",
    "writing a checkpoint: the manifest",
    "writing a checkpoint: before the rename",
    "between rename and cleanup",
    "in the cleanup",
    "evaluating",
    "rolling back",
    "before the last word",
]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with Nursery(tmp_path_factory.mktemp("lives")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def whole(nursery):
    """The run that nothing interrupts."""
    life = nursery.live(*RUN, *SAME, "name=whole")
    assert life.status == 0, life.output
    return nursery.folder / "runs/whole"


@pytest.fixture
def busy():
    """A machine that others keep busy: two programs for each core that never wait."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
        assert all(loop.poll() is None for loop in loops), "they ran to the end"
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def assert_the_same_run(run, whole):
    """Metrics, weights, trained samples and the ledger's story, bit for bit; and the story is whole."""
    assert_the_same_bits(run, whole)
    assert_nothing_lost(run)


def assert_the_same_bits(run, whole):
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()
    files = sorted(path.name for path in (whole / "rollouts").iterdir())
    assert sorted(path.name for path in (run / "rollouts").iterdir()) == files
    for name in files:
        assert parquet.read_table(run / "rollouts" / name).equals(parquet.read_table(whole / "rollouts" / name)), name
    ours, theirs = ledger_rows(run), ledger_rows(whole)
    different = [table for table in LEDGER_TABLES if ours[table] != theirs[table]]
    assert different in ([], ["prompts"])
    both = {row[0] for row in ours["prompts"]} & {row[0] for row in theirs["prompts"]}  # freed at other times
    assert both and [r for r in ours["prompts"] if r[0] in both] == [r for r in theirs["prompts"] if r[0] in both]


def assert_nothing_lost(run):
    account.assert_nothing_lost(run, steps=STEPS, samples=GROUPS * SAMPLES, prompts=PROMPTS, eval_every=4)


def die_of(nursery, name, places):
    for place in places:
        life = nursery.live(*RUN, *SAME, f"name={name}", place=PLACES[place])
        assert life.status == KILLED, f"{place}: exit status {life.status}\n{life.output}"
    life = nursery.live(*RUN, *SAME, f"name={name}")
    assert life.status == 0, life.output
    return life


def test_killed_at_phase_after_phase_it_ends_as_if_nothing_had_happened(nursery, whole, busy):
    life = die_of(nursery, "killed", IN_CI)
    assert "resumed after step" in life.output and "Accuracy before" in life.output
    assert_the_same_run(nursery.folder / "runs/killed", whole)


def test_verdicts_of_worker_processes_are_taken_in_a_fixed_order(nursery, whole):
    """With two reward workers, killed while they judge: still the run that judged in its own process."""
    run = [*RUN, *SAME, "name=workers", "reward.workers=2"]
    life = nursery.live(*run, place=Place("rlpost.rewards.scoring:RewardScorer.submit", "after", nth=70))
    assert life.status == KILLED, life.output
    life = nursery.live(*run)
    assert life.status == 0, life.output
    assert_the_same_run(nursery.folder / "runs/workers", whole)


@pytest.mark.torture
@pytest.mark.parametrize("place", PLACES)
def test_killed_at_each_place_there_is(nursery, whole, place):
    """Each in a run of its own; a place that only a resumed life comes by, in its second life."""
    name = place.replace(" ", "-").replace(":", "").replace("'", "")
    before = ["between abort and store"] if place in ("rolling back", "loading the trainer") else []
    die_of(nursery, name, [*before, place])
    assert_the_same_run(nursery.folder / "runs" / name, whole)


def die_at_random(nursery, name, number, seed, *, run=RUN, mean_s=4.0):
    """``number`` lives killed at random; where one ends by itself the next run starts. Returns (runs, kills)."""
    rng = random.Random(seed)
    runs, kills = [f"{name}-1"], 0
    while kills < number:
        life = nursery.live(*run, *SAME, f"name={runs[-1]}", after_s=rng.expovariate(1 / mean_s))
        if life.status == KILLED:
            kills += 1
        else:
            assert life.status == 0, life.output
            runs.append(f"{name}-{len(runs) + 1}")
    life = nursery.live(*run, *SAME, f"name={runs[-1]}")
    assert life.status == 0, life.output
    return runs, kills


def test_killed_at_a_few_random_instants(nursery, whole, busy):
    runs, _ = die_at_random(nursery, "few", 3, seed=random.randrange(1 << 30))
    assert_the_same_run(nursery.folder / "runs" / runs[0], whole)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_killed_at_a_hundred_random_instants(nursery, whole):
    seed = random.randrange(1 << 30)
    runs, kills = die_at_random(nursery, "hundred", 100, seed)
    print(f"seed {seed}: {kills} kills over {len(runs)} runs")
    for name in runs:
        assert_the_same_run(nursery.folder / "runs" / name, whole)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_a_run_of_the_demos_size_is_killed_a_hundred_times(nursery):
    """30 steps of 256 samples, saved after each: most lives end before they finish one step."""
    demo = ["train", "recipe=math/arithmetic", "checkpoint.every=1", "eval.every=0", "eval.max_prompts=50"]
    demo.append("logging.wandb=disabled")
    life = nursery.live(*demo, *SAME, "name=demo")
    assert life.status == 0, life.output
    seed = random.randrange(1 << 30)
    runs, kills = die_at_random(nursery, "demo-killed", 100, seed, run=demo, mean_s=5.0)
    print(f"seed {seed}: {kills} kills over {len(runs)} runs")
    for name in runs:
        assert_the_same_bits(nursery.folder / "runs" / name, nursery.folder / "runs/demo")
        trained = [
            (r["uid"], r["index"]) for rows in rollouts_of(nursery.folder / "runs" / name).values() for r in rows
        ]
        assert len(trained) == len(set(trained)) == 30 * 256


# -- asked to stop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_while_generating_it_keeps_what_was_generated(nursery, number, status, busy):
    name = f"asked-{status}"
    run = nursery.folder / "runs" / name
    engine_step = Place("rlpost.engine.vllm:VLLMEngine.step", nth=RESPONSE_TOKENS + 150)
    life = nursery.live(*RUN, f"name={name}", place=engine_step, number=number)
    assert life.status == status, life.output
    assert "saving" in life.output and "the same command resumes from there" in life.output
    (stopped,) = (run / "checkpoints").glob("step-*-stopped-1")
    kept = segments_of(stopped / "ledger.sqlite")
    under_way = int(stopped.name.split("-")[1]) + 1
    assert any(step == under_way for step in kept.values()), "the half of a step is in the checkpoint"

    life = nursery.live(*RUN, f"name={name}")
    assert life.status == 0 and "undone" not in life.output, life.output
    assert_nothing_lost(run)
    assert kept.items() <= segments_of(run / "ledger.sqlite").items(), "tokens of before the stop were generated again"


def segments_of(path):
    db = sqlite3.connect(path)
    rows = {
        row[:-1]: row[-1]
        for row in db.execute("SELECT draw, idx, num_tokens, checksum, policy_version, step FROM segments")
    }
    db.close()
    return rows


def test_asked_to_stop_while_it_waits_for_a_slow_reward_it_saves_all_the_same(nursery):
    (nursery.folder / "slow.py").write_text(
        "import time\n\ndef reward(response):\n    time.sleep(100)\n    return 1.0\n"
    )
    slow = ["reward.function=slow.reward", "reward.workers=1", "eval.every=-1"]
    waiting = Place("rlpost.rewards.scoring:RewardScorer.wait")
    life = nursery.live(*RUN, *slow, "name=waiting", place=waiting, number=signal.SIGTERM)
    assert life.status == 143 and "the same command resumes from there" in life.output, life.output
    stopped = nursery.folder / "runs/waiting/checkpoints/step-000000-stopped-1"
    life = nursery.live("buffer", str(stopped))
    assert life.status == 0 and "scoring" in life.output and "balance" not in life.output, life.output


def test_asked_to_stop_in_an_update_it_finishes_the_update_if_time_allows(nursery):
    place = Place("rlpost.train.deepspeed_trainer:DeepSpeedTrainer._optimizer_step", nth=3)
    life = nursery.live(*RUN, "name=updating", place=place, number=signal.SIGTERM)
    assert life.status == 143 and "step 3/12" in life.output, life.output
    checkpoints = nursery.folder / "runs/updating/checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000002", "step-000003"]

    # Four milliseconds are not enough for a checkpoint: the one before stands.
    place = Place("rlpost.train.deepspeed_trainer:DeepSpeedTrainer._optimizer_step", nth=2)
    hurried = "checkpoint.stop_deadline_s=0.004"
    life = nursery.live(*RUN, "name=updating", hurried, place=place, number=signal.SIGTERM)
    assert life.status == 143 and "the last checkpoint remains" in life.output, life.output
    assert not list(checkpoints.glob("step-000005"))
    assert "checkpoint.stop_deadline_s: 30.0 -> 0.004" in life.output, "changed settings are shown"


def test_asked_to_stop_in_an_evaluation_it_loses_no_step(nursery):
    place = Place("rlpost.reporting.progress:Progress.evaluating", nth=3)
    life = nursery.live(*RUN, "name=judging", "steps=1", place=place, number=signal.SIGTERM)
    assert life.status == 143, life.output
    assert (nursery.folder / "runs/judging/checkpoints/step-000000").is_dir()
    life = nursery.live(*RUN, "name=judging", "steps=1")
    assert life.status == 0 and life.output.count("evaluation after step 0") == 1, life.output


def test_deterministic_runs_stop_at_their_last_checkpoint(nursery, whole):
    engine_step = Place("rlpost.engine.vllm:VLLMEngine.step", nth=RESPONSE_TOKENS + 150)
    life = nursery.live(*RUN, *SAME, "name=exact", place=engine_step, number=signal.SIGTERM)
    assert life.status == 143 and "ended by SIGTERM" in life.output, life.output
    assert not list((nursery.folder / "runs/exact/checkpoints").glob("*stopped*"))
    life = nursery.live(*RUN, *SAME, "name=exact")
    assert life.status == 0, life.output
    assert_the_same_run(nursery.folder / "runs/exact", whole)


# -- going back and going on ---------------------------------------------------------------------------------------


def test_a_finished_name_makes_room_and_a_live_one_is_refused(nursery, whole):
    life = nursery.live(*RUN, "name=whole", "steps=1", "eval.every=-1", "checkpoint.every=-1")
    assert life.status == 0 and "run whole is taken; this one is whole-2" in life.output
    with open(whole / "lock", "a") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        life = nursery.live(*RUN, *SAME, "name=whole", f"resume={whole}/checkpoints/step-000010")
        assert life.status == 3 and "one that no other process uses" in life.output


def test_going_back_to_a_checkpoint_repeats_the_run_from_there(nursery, whole):
    run = nursery.folder / "runs/back"
    assert nursery.live(*RUN, *SAME, "name=back", "checkpoint.keep_every=4").status == 0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{step:06d}" for step in (4, 8, 10, 12)]
    life = nursery.live(*RUN, *SAME, "name=back", f"resume={run}/checkpoints/step-000004", "checkpoint.keep_every=4")
    assert life.status == 0 and "resumed after step 4" in life.output, life.output
    assert "set aside" in life.output and "checkpoint: " not in life.output
    assert_the_same_run(run, whole)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(nursery, whole):
    run = nursery.folder / "runs/damaged"
    place = Place("rlpost.rollout.buffer:RolloutBuffer.store", nth=8)
    assert nursery.live(*RUN, *SAME, "name=damaged", place=place).status == KILLED
    (weights,) = (run / "checkpoints/step-000006/trainer/ds").glob("*model_states.pt")
    weights.write_bytes(weights.read_bytes()[:-100])
    life = nursery.live(*RUN, *SAME, "name=damaged")
    assert life.status == 0, life.output
    assert "step-000006 is damaged" in life.output and "skipping it" in life.output
    assert "resumed after step 4" in life.output
    assert_the_same_run(run, whole)


def test_a_lost_or_damaged_ledger_is_made_again_from_the_checkpoint(nursery, whole):
    run = nursery.folder / "runs/ledgerless"
    place = Place("rlpost.rollout.buffer:RolloutBuffer.store", nth=8)
    assert nursery.live(*RUN, *SAME, "name=ledgerless", place=place).status == KILLED
    raw = bytearray((run / "ledger.sqlite").read_bytes())
    for page in range(3, len(raw) // 4096):
        raw[page * 4096 : page * 4096 + 2048] = bytes(2048)
    (run / "ledger.sqlite").write_bytes(bytes(raw))
    (run / "ledger.sqlite-wal").unlink()
    life = nursery.live(*RUN, *SAME, "name=ledgerless")
    assert life.status == 0, life.output
    assert "the ledger could not be used" in life.output and (run / "ledger.sqlite.set-aside-1").exists()
    for file in ("metrics.jsonl", "model/model.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_a_refused_going_back_leaves_the_run_as_it_was(nursery, whole):
    """Whatever is wrong with resume=PATH shows before anything is renamed, removed or rolled back."""
    before = {str(p.relative_to(whole)): p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != "lock"}
    path = f"resume={whole}/checkpoints/step-000010"
    for change in ("rollout.samples_per_group=2", "seed=3", "train=zero2", "rollout.max_response_tokens=3"):
        life = nursery.live(*RUN, "name=whole", path, change)
        assert life.status == 3 or (life.status == 2 and "seed" in change), life.output
    after = {str(p.relative_to(whole)): p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != "lock"}
    assert {name for name in after if after[name] != before.get(name)} <= {".", "verdicts.sqlite"}
    assert after.keys() == before.keys()


@pytest.mark.parametrize(
    "change, message",
    [
        ("train=zero2", "trainer checkpoint.*'zero_stage': 2"),
        ("train.lr=2e-4", "deterministic=true: train.lr: got 0.0002"),
        ("seed=1", "deterministic=true: seed"),
        ("rollout.samples_per_group=2", "deterministic=true: rollout.samples_per_group"),
    ],
)
def test_a_resume_that_could_not_be_the_same_run_is_refused_before_a_device_is_touched(nursery, whole, change, message):
    run = nursery.folder / "runs/refused"
    if not run.exists():
        shutil.copytree(whole, run)
        (run / "finished.json").unlink()
    before = sorted(str(p) for p in run.rglob("*"))
    life = nursery.live(*RUN, *SAME, "name=refused", change)
    assert life.status in (2, 3) and re.search(message, life.output), life.output
    assert "resumed after step" not in life.output and sorted(str(p) for p in run.rglob("*")) == before


# -- what is left behind -------------------------------------------------------------------------------------------


def test_the_exported_model_is_the_one_that_was_evaluated(nursery, whole):
    """Loaded by vLLM from its folder, it gives the same answers to the same seeds."""
    out = nursery.folder / "exported"
    life = nursery.live("export", str(whole), str(out))
    assert life.status == 0 and "the model of" in life.output and "Traceback" not in life.output, life.output
    assert (out / "model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    card = (out / "README.md").read_text()
    assert card == (whole / "model/README.md").read_text() and "| Steps | 12 of 12 |" in card
    life = nursery.live("eval", "recipe=math/arithmetic", f"model.path={out}", *SMALL)
    last = json.loads((whole / "finished.json").read_text())["evaluations"][-1]["eval/accuracy"]
    assert life.status == 0 and f"mean@1    {100 * last:.1f} %" in life.output, life.output
    life = nursery.live("export", str(whole), str(out))
    assert life.status == 3 and "a new or empty folder" in life.output
    damaged = nursery.folder / "runs/half"
    shutil.copytree(whole, damaged)
    (damaged / "checkpoints/step-000012/state.json").write_text("{")
    life = nursery.live("export", str(damaged), str(nursery.folder / "older"))
    assert life.status == 0 and "skipping it" in life.output and "step-000010" in life.output, life.output
    life = nursery.live("export", str(whole), str(nursery.folder / "no"), "--step", "7")
    assert life.status == 3 and "no checkpoint after step 7" in life.output


def test_the_ledger_can_be_read(nursery, whole):
    life = nursery.live("buffer", str(whole))
    assert life.status == 0 and f"{STEPS * GROUPS} trained" in life.output and "balance" not in life.output, life.output
    life = nursery.live("buffer", str(whole), "1:3")
    assert life.status == 0 and "1:3: draw" in life.output and "policy" in life.output, life.output

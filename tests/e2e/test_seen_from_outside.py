"""One run that is stopped, killed and finished, looked at from outside all the while: watch, runs, timeline, W&B."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections import defaultdict

import pytest

from rlpost.cli import main
from rlpost.reporting.timeline import assign_slots, concurrency, read_timeline
from rlpost.workers.canary import RESPONSE_TOKENS
from tests.reporting.wandb_file import read_runs

from .lives import KILLED, Nursery, Place
from .program import SMALL, read_metrics, rollouts_of, steps_of

STEPS = 8
RUN = ["train", "recipe=math/arithmetic", "checkpoint.every=2", "eval.every=4", *SMALL]
WHOLE = [*RUN, f"steps={STEPS}", "name=whole-seed3", "seed=3", "logging.wandb=offline"]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    with Nursery(folder) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def run(nursery):
    """Stopped in the middle of a step, killed in a later one, finished; ``seen`` holds what was printed meanwhile."""
    path = nursery.folder / "runs/whole-seed3"
    seen = {}
    engine_step = "rlpost.engine.vllm:VLLMEngine.step"
    life = nursery.live(*WHOLE, place=Place(engine_step, nth=RESPONSE_TOKENS + 230), number=signal.SIGTERM)
    assert life.status == 128 + signal.SIGTERM, life.output
    seen["stopped"] = show("runs", str(path.parent)), show("watch", str(path), "--once")
    life = nursery.live(*WHOLE, place=Place("rlpost.rollout.buffer:RolloutBuffer.settle", nth=4))
    assert life.status == KILLED, life.output
    seen["killed"] = show("runs", str(path.parent)), show("watch", str(path), "--once")
    last = threading.Thread(target=lambda: seen.update(life=nursery.live(*WHOLE)))
    last.start()
    seen["live"] = watch_until(path, last)
    last.join()
    assert seen["life"].status == 0, seen["life"].output
    return path, seen


def show(*argv):
    """What the command prints, on its own standard output."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(list(argv)) == 0
    return out.getvalue()


def watch_until(path, thread):
    """All different frames of a run that is going on."""
    frames = []
    while thread.is_alive():
        frame = show("watch", str(path), "--once")
        if "running" in frame.splitlines()[0]:
            frames.append((frame, show("runs", str(path.parent))))
        time.sleep(0.05)
    return frames


def test_the_states_of_a_run(run):
    _, seen = run
    listed, frame = seen["stopped"]
    assert "waiting" in listed and "run the same command to resume" in frame and "stopped after step" in frame
    listed, frame = seen["killed"]
    assert "killed" in listed and "its process is gone" in frame
    path, _ = run
    listed = show("runs", str(path.parent))
    assert f"finished  {STEPS}/{STEPS}" in listed and "math/arithmetic" in listed
    best = max(row["eval/accuracy"] for row in read_metrics(path) if "eval/accuracy" in row)
    assert f"{100 * best:.1f} %" in listed


def test_a_run_is_watched_live(run):
    _, seen = run
    frames = [frame for frame, _ in seen["live"]]
    assert frames and all("running" in listed for _, listed in seen["live"][:-1])
    phases = ("generating", "updating the policy", "evaluating", "copying weights", "saving")
    assert sum(any(phase in frame for frame in frames) for phase in phases) >= 2
    assert any("samples running" in frame or " responses" in frame for frame in frames)
    last = frames[-1]
    assert "accuracy" in last and "reward" in last and "responses trained in step" in last and "→" in last
    assert any("left" in frame for frame in frames)


def test_looking_changes_nothing(run):
    path, _ = run

    def contents():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return {str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in files}

    before = contents()
    show("watch", str(path), "--once")
    show("runs", str(path.parent))
    show("runs", "--compare", str(path), str(path))
    read_timeline(path)
    assert contents() == before


def test_the_timeline_has_every_token_of_every_sample_once(run):
    """Across a stop in the middle of a step, a kill and two resumes."""
    path, _ = run
    steps = read_timeline(path)
    assert [step.step for step in steps] == list(range(STEPS + 1))
    tokens, versions = defaultdict(int), defaultdict(set)
    for step in steps:
        for uid, index, version, num in zip(
            *(step.spans[name] for name in ("uid", "index", "policy_version", "tokens")), strict=True
        ):
            tokens[uid, index] += num
            if num:
                versions[uid, index].add(version)
    rollouts = rollouts_of(path)
    for number, rows in rollouts.items():
        assert {row["uid"] for row in rows} == set(steps[number].admitted)
        for row in rows:
            key = row["uid"], row["index"]
            assert tokens[key] == len(row["token_ids"]), key
            assert versions[key] == set(row["policy_versions"]), key
    assert any(end == "paused" for step in steps for end in step.spans["end"])


def test_the_timeline_agrees_with_the_metrics(run):
    path, _ = run
    rows = {row["step"]: row for row in steps_of(path)}
    for step in read_timeline(path)[1:]:
        starts, ends = step.spans["start_s"], step.spans["end_s"]
        assert max(running for _, running in concurrency(starts, ends)) <= 16  # engine.max_slots
        assert max(assign_slots(starts, ends)) < 16
        took = {name: sum(end - start for of, start, end in step.phases if of == name) for name, *_ in step.phases}
        assert took["update"] == pytest.approx(rows[step.step]["time/update"], abs=0.05)
        generated = [(s, e) for name, s, e in step.phases if name == "generate"]
        assert all(
            any(s - 0.01 <= a and b <= e + 0.01 for s, e in generated) for a, b in zip(starts, ends, strict=True)
        )
        times = sorted((start, end) for _, start, end in step.phases)
        assert all(a[1] <= b[0] + 1e-3 for a, b in zip(times, times[1:], strict=False)), "phases overlap"
        *_, last = (sums for sums in step.iterations if sums["phase"] == "generate")
        assert last["moments"][0][0] == rows[step.step]["rollout/engine_steps"]
        assert last["moments"][0][2] == rows[step.step]["rollout/prefill_tokens"]
        assert 0 < last["targets"][0] <= rows[step.step]["time/generate"]
    evaluated = [s.step for s in read_timeline(path) if any(i["phase"] == "eval" for i in s.iterations)]
    assert evaluated == [0, 4, 8]


def test_a_plan_is_made_from_it(run):
    path, _ = run
    argv = ["plan", "recipe=math/arithmetic", *SMALL, f"from={path}", "--ratios", "2", "--steps", "8", "--json"]
    plan = json.loads(show(*argv))
    (row,) = plan["rows"]
    assert plan["extrapolated"] == [] and plan["check"]["steps"] == STEPS - 2
    measured = plan["check"]["measured_step_s"]
    assert 0.5 < row["step_s"] / measured < 2, "nothing near the run that it was made from"
    assert all(plan["costs"][name] > 0 for name in ("sample_s", "update_token_s", "publish_s", "prompt_tokens"))


def test_the_trace_has_every_stay_and_arrows_between_them(run, tmp_path):
    path, _ = run
    out = tmp_path / "trace.json"
    assert "events" in show("timeline", str(path), str(out))
    events = json.loads(out.read_text())["traceEvents"]
    stays = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert len(stays) == sum(len(step.spans["uid"]) for step in read_timeline(path))
    arrows = [event for event in events if event["ph"] in "sf"]
    resumed = sum(event["args"]["kind"] == "resumed" for event in stays)
    assert len(arrows) >= resumed > 0
    assert all(event["dur"] >= 0 for event in stays)


def test_wandb_has_it_all(run):
    path, _ = run
    lives = read_runs(path / "wandb")
    assert len(lives) == 3, "each life is a part of the same run"
    assert len({life.run.run_id for life in lives}) == 1
    first = lives[0].run
    assert first.run_group == "whole" and list(first.tags) == ["grpo", "seed 3"]
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert config["recipe"] == "math/arithmetic" and config["rollout"]["groups_per_step"] == 4
    axes = {m.glob_name or m.name: m for m in lives[0].metrics}
    assert {"step", "total/samples", "total/tokens", "time_s"} <= axes.keys()
    assert axes["eval/accuracy"].summary.max and axes["eval/accuracy"].summary.last
    rows = [row for life in lives for row in life.history]
    numbers = [row for row in rows if "reward/mean" in row or "eval/accuracy" in row]
    assert all({"step", "total/samples", "total/tokens", "time_s"} <= row.keys() for row in numbers)
    final = numbers[-1]
    assert final["step"] == STEPS and final["total/samples"] == STEPS * 16 and "eval/accuracy" in final
    resumed = next(row for row in lives[2].history if "total/samples" in row)
    assert resumed["total/samples"] == 16 * resumed["step"] > 16, "a resumed part goes on where the run stands"
    histograms = [row["histogram/length"] for row in rows if "histogram/length" in row]
    assert len(histograms) >= STEPS and sum(histograms[-1]["values"]) == 16
    assert {"histogram/staleness", "histogram/advantage"} <= {name for row in rows for name in row}
    table = lives[2].tables["eval_rollouts"][-1]
    assert {"prompt", "response", "reward", "reward: accuracy", "policy_versions", "finish_reason"} <= set(
        table["columns"]
    ) and len(table["data"]) == 10
    assert [a.type for a in lives[2].artifacts if a.type == "timeline"] == ["timeline"]


@pytest.fixture(scope="module")
def other(nursery):
    """A short run with another rate, whose answers are cut before they can be right."""
    life = nursery.live(
        *RUN, "steps=4", "name=other", "train.lr=0.001", "eval.every=-1", "rollout.max_response_tokens=6"
    )
    assert life.status == 0, life.output
    return nursery.folder / "runs/other", life.output


def test_two_runs_are_compared(run, other):
    runs = run[0], other[0]
    lines = {line.split()[0]: line.split() for line in show("runs", "--compare", *map(str, runs)).splitlines() if line}
    assert lines["train.lr"][1:] == ["0.0001", "0.001"] and lines["steps"][1:] == [str(STEPS), "4"]
    mean = [sum(row["reward/mean"] for row in steps_of(path)[:4]) / 4 for path in runs]
    a, b, difference = map(float, lines["reward/mean"][1:4])
    assert (a, b) == tuple(float(f"{m:.4g}") for m in mean)
    assert difference == pytest.approx(mean[1] - mean[0], abs=1e-3)
    assert lines["reward/mean"][4:] == ["steps", "1", "to", "4"]
    assert "eval/accuracy" not in lines, "only one of them was evaluated"


def test_a_run_says_what_is_wrong_with_it_once(run, other):
    path, output = other
    words = "responses of the last 3 steps were cut at 6 tokens"
    assert output.count(words) == 1 and "warning: " in output
    warnings = [json.loads(line) for line in (path / "warnings.jsonl").read_text().splitlines()]
    assert [w["step"] for w in warnings if w["name"] == "truncated"] == [3]
    assert "raise rollout.max_response_tokens" in " ".join(show("watch", str(path), "--once").split())
    healthy = (run[0] / "warnings.jsonl").read_text()
    assert "truncated" not in healthy and "idle_tail" not in healthy


def test_the_dashboard_without_an_account_is_a_file(run, monkeypatch, tmp_path):
    path, _ = run
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    said = show("dashboard", "wandb", str(path))
    assert "no W&B account" in said and "wandb_dashboard.json" in said
    layout = json.loads((path / "wandb_dashboard.json").read_text())
    sections = layout["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    drawn = {name for section in sections for panel in section["panels"] for name in panel["config"].get("metrics", [])}
    logged = {name for row in read_metrics(path) for name in row}
    no_time = {"waterfall/idle", "waterfall/old_logprobs"}  # parts of a step that may take none
    assert drawn - logged <= {"loss/kl", *no_time}, "every panel but the reference's KL, which is off, shows something"
    assert layout["workspace"]["spec"]["section"]["runSets"][0]["grouping"] == [{"section": "run", "name": "group"}]

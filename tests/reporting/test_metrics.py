"""The log of a run: lines, rewinding, rollouts as Parquet, and what W&B and TensorBoard really wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from rlpost.config import LoggingConfig
from rlpost.durable.run_dir import TRACKER_ID
from rlpost.reporting import rollout_files, tracking
from rlpost.reporting.metrics import MetricsWriter, read_metrics, read_steps
from rlpost.types import Group, Prompt, Sample, Segment
from tests.reporting.wandb_file import read_records, read_runs


def writer(folder: Path, *, say=print, split_times=False, **logging) -> MetricsWriter:
    options = LoggingConfig(**{"wandb": "disabled", **logging})
    decode = lambda ids: f"<{len(ids)}>"  # noqa: E731
    return MetricsWriter(folder, options, {"seed": 1}, "a-run", say=say, decode=decode, split_times=split_times)


def segment(*token_ids: int, version: int) -> Segment:
    ids = np.array(token_ids, np.int32)
    return Segment(token_ids=ids, rollout_logprobs=-0.5 * np.ones(len(ids), np.float32), policy_version=version)


def two_groups() -> list[Group]:
    prompt = Prompt(uid="0:1", token_ids=np.array([1, 2], np.int32), text="1+2?", reference=3)
    carried = Sample(uid="0:1", index=0, segments=(segment(7, 8, version=3), segment(9, version=4)),
                     finish_reason="stop", reward=1.0, reward_parts={"accuracy": 1.0})  # fmt: skip
    failed = Sample(uid="0:1", index=1, segments=(segment(7, version=4),), finish_reason="length", failure="late")
    wrong = Sample(uid="0:1", index=2, segments=(segment(8, version=4),), finish_reason="stop", reward=0.0)
    empty = Sample(uid="0:2", index=0, finish_reason="stop", reward=0.5)
    other = Prompt(uid="0:2", token_ids=np.array([1], np.int32), text="2?")
    return [
        Group(uid="0:1", prompt=prompt, samples=(carried, failed, wrong)),
        Group(uid="0:2", prompt=other, samples=(empty,)),
    ]


ADVANTAGES = [np.array([0.7, -0.7]), np.array([0.0])]


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_a_line_is_one_flat_object_with_step_and_time(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log(0, {"eval/accuracy": np.float32(0.5), "rollout/engine_steps": np.int64(3)})
    log.log(1, {"reward/mean": 1})
    log.close()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {"step": 0, "time_s": first["time_s"], "eval/accuracy": 0.5, "rollout/engine_steps": 3}
    assert second["step"] == 1 and second["time_s"] >= first["time_s"] >= 0


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log(3, {"reward/mean": 0.25})
    assert read_metrics(tmp_path)[0]["reward/mean"] == 0.25


def test_numbers_that_are_not_finite_become_null_and_are_counted_and_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    log = writer(tmp_path, say=said.append)
    log.log(1, {"loss/policy": float("nan"), "loss/kl": np.float32("inf"), "loss/lr": 0.1})
    log.log(2, {"loss/policy": float("-inf")})
    log.close()
    rows = read_metrics(tmp_path)
    assert rows[0]["loss/policy"] is None and rows[0]["loss/kl"] is None and rows[0]["loss/lr"] == 0.1
    assert [row["log/not_finite"] for row in rows] == [2, 1]
    assert log.num_not_finite == 3
    assert len(said) == 2 and "loss/policy" in said[0] and "step 1" in said[0]


@pytest.mark.parametrize("value", ["0.5", None])
def test_something_that_is_no_number_is_our_own_bug(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="loss/policy"):
        writer(tmp_path).log(1, {"loss/policy": value})


def test_rewinding_forgets_later_steps_and_goes_on_in_time(tmp_path: Path) -> None:
    log = writer(tmp_path)
    for step in range(5):
        log.log(step, {"reward/mean": step})
        log.log_rollouts(step, two_groups(), ADVANTAGES)
    log.close()
    lines = [json.loads(line) | {"time_s": 100.0 + n} for n, line in enumerate((tmp_path / "metrics.jsonl").open())]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    again = writer(tmp_path)
    again.rewind(2)
    again.log(3, {"reward/mean": 33})
    again.close()
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0), (1, 1), (2, 2), (3, 33)]
    assert 102.0 <= rows[-1]["time_s"] < 110.0
    kept = sorted(file.name for file in (tmp_path / "rollouts").iterdir())
    assert kept == ["step-000000.parquet", "step-000001.parquet", "step-000002.parquet"]


def test_rewinding_to_the_start_forgets_the_first_evaluation_too(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log(0, {"eval/accuracy": 0.5})
    log.log(1, {"reward/mean": 1})
    log.close()
    again = writer(tmp_path)
    again.rewind(None)
    again.log(0, {"eval/accuracy": 0.5})
    again.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]


def test_a_run_stopped_in_its_first_step_keeps_its_first_evaluation(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log(0, {"eval/accuracy": 0.5})
    log.log(1, {"loss/total": 1.0})
    log.close()
    again = writer(tmp_path)
    again.rewind(0, evaluated_step=0)
    again.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]


def test_lines_that_cannot_be_read_are_dropped_and_said(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log(1, {"loss/total": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n[1]\n{}\n\xff\n" + b'{"step": 2, "tim')
    said: list[str] = []
    again = writer(tmp_path, say=said.append)
    again.log(2, {"loss/total": 2.0})
    again.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert len(said) == 1 and "4 unreadable lines" in said[0]


def test_what_only_the_end_of_a_run_logs_is_logged_once(tmp_path: Path) -> None:
    for _ in range(2):
        log = writer(tmp_path)
        log.rewind(3)
        log.log(3, {"replay/error": 0.1})
        log.close()
    assert len(read_metrics(tmp_path)) == 1


def test_rewinding_forgets_an_evaluation_that_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    log = writer(tmp_path)
    for row in ({"reward/mean": 1}, {"eval/accuracy": 0.5}):
        log.log(2, row)
    log.close()
    again = writer(tmp_path)
    again.rewind(2, evaluated_step=0)
    again.log(2, {"eval/accuracy": 0.6})
    again.close()
    assert [row.get("eval/accuracy") for row in read_metrics(tmp_path)] == [None, 0.6]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    whole = '{"step": 1, "time_s": 5.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "ti')
    log = writer(tmp_path)
    log.log(2, {"reward/mean": 1.0})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


# --- rollouts --------------------------------------------------------------------------------------------------------


def test_rollouts_come_back_from_parquet(tmp_path: Path) -> None:
    log = writer(tmp_path)
    log.log_rollouts(12, two_groups(), ADVANTAGES)
    log.close()
    rows = parquet.read_table(tmp_path / "rollouts/step-000012.parquet").to_pylist()
    assert [row["index"] for row in rows] == [0, 1, 2, 0]
    carried, failed, wrong, empty = rows
    assert carried["token_ids"] == [7, 8, 9] and carried["policy_versions"] == [3, 3, 4]
    assert carried["rollout_logprobs"] == [-0.5] * 3 and carried["prompt_token_ids"] == [1, 2]
    assert carried["response"] == "<3>" and carried["prompt"] == "1+2?"
    assert json.loads(carried["reward_parts"]) == {"accuracy": 1.0}
    assert failed["reward"] is None and failed["advantage"] is None and failed["failure"] == "late"
    assert (carried["advantage"], wrong["advantage"], empty["advantage"]) == (0.7, -0.7, 0.0)
    assert empty["token_ids"] == [] and not list((tmp_path / "rollouts").glob("*.unfinished"))


def test_advantages_must_fit_the_samples_with_a_reward() -> None:
    with pytest.raises(AssertionError, match="more advantages"):
        rollout_files.to_rows(two_groups(), [np.array([1.0, 2.0, 3.0]), np.array([0.0])], None)


def test_no_file_when_rollouts_are_not_kept(tmp_path: Path) -> None:
    log = writer(tmp_path, keep_rollouts=False)
    log.log_rollouts(1, two_groups(), ADVANTAGES)
    log.close()
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(("kept", "rows", "decoded"), [(True, 1, 4), (False, 1, 3), (False, 0, 0)])
def test_only_answers_that_are_kept_or_shown_are_made_text(tmp_path: Path, kept: bool, rows: int, decoded: int) -> None:
    made: list[list[int]] = []
    log = writer(tmp_path, keep_rollouts=kept, table_rows=rows)
    log._decode = lambda ids: made.append(ids) or ""  # type: ignore[func-returns-value]
    log.log_rollouts(1, two_groups(), ADVANTAGES)
    log.close()
    assert len(made) == decoded


def test_the_table_shows_versions_and_failures() -> None:
    columns, values = rollout_files.to_table(rollout_files.to_rows(two_groups(), ADVANTAGES, None), 2)
    assert len(values) == 2 and all(len(row) == len(columns) for row in values)
    assert dict(zip(columns, values[0], strict=True))["policy_versions"] == "3 4"
    assert dict(zip(columns, values[1], strict=True))["failure"] == "late"
    parts = [dict(zip(columns, row, strict=True))["reward: accuracy"] for row in values]
    assert parts == [1.0, None], "each part of the reward has a column; the failed sample has none"


def test_the_evaluations_table_shows_the_same_problems_each_time(tmp_path: Path) -> None:
    shown: list[list[str]] = []

    class Table:
        def log_table(self, step: int, name: str, table: tuple[list[str], list[list[object]]]) -> None:
            assert name == "eval_rollouts"
            shown.append([row[0] for row in table[1]])

    log = writer(tmp_path, table_rows=3)
    log._trackers = [Table()]
    answers = []
    for n in range(12):
        prompt = Prompt(uid=f"eval:{n}", token_ids=np.array([1], np.int32), text=f"p{n}")
        answers.append((prompt, Sample(uid=prompt.uid, index=0, finish_reason="stop", reward=1.0)))
    log.log_evaluation(0, answers)
    log.log_evaluation(1, answers[::-1])
    assert shown == [["p0", "p1", "p2"]] * 2


def test_what_was_logged_of_a_step_is_one_mapping(tmp_path: Path) -> None:
    log = writer(tmp_path, split_times=True)
    log.log(0, {"eval/accuracy": 0.5})
    log.log(1, {"reward/mean": 0.25, "time/step": 2.0, "loss/policy": float("nan")})
    log.log(1, {"time/save": 1.0, "eval/accuracy": 0.75})
    log.close()
    first, second = read_steps(tmp_path)
    assert first["step"] == 0 and first["eval/accuracy"] == 0.5
    assert {k: v for k, v in second.items() if k != "time_s"} == {
        "step": 1,
        "reward/mean": 0.25,
        "time/step": 2.0,
        "log/not_finite": 1,
        "time/save": 1.0,
        "eval/accuracy": 0.75,
    }
    assert read_steps(tmp_path / "absent") == []


# --- trackers --------------------------------------------------------------------------------------------------------


OFFLINE_RUN = """
import sys
import numpy as np
from pathlib import Path
from rlpost.config import LoggingConfig
from rlpost.reporting.metrics import MetricsWriter
from rlpost.types import Group, Prompt, Sample, Segment

segment = Segment(token_ids=np.array([5], np.int32), rollout_logprobs=np.array([-1.0], np.float32), policy_version=1)
sample = Sample(uid="0:0", index=0, segments=(segment,), finish_reason="stop", reward=1.0)
prompt = Prompt(uid="0:0", token_ids=np.array([1], np.int32), text="one?")
for resumed in (False, True):
    config = {"train": {"lr": 0.125}, "name": "a-run-seed2", "seed": 2, "algo": {"name": "gspo"}}
    log = MetricsWriter(Path(sys.argv[1]), LoggingConfig(tags=["t", "gspo"]), config, "a-run-seed2-2")
    if resumed:
        log.rewind(4)
        log.log(4, {"eval/accuracy": 0.5})
    log.log(4 + resumed, {"reward/mean": 0.75 + resumed, "loss/policy": float("nan"), "total/samples": 64 + resumed})
    log.log_histograms(4 + resumed, {"histogram/length": np.array([3, 3, 5]), "histogram/reward": np.array([0.5, 1.0])})
    log.alert("entropy_collapse" * 9, "the policy answers nearly the same")
    log.log_evaluation(4 + resumed, [(prompt, sample)])
    (Path(sys.argv[1]) / "timeline.jsonl").write_text("{}")
    log.keep_files("timeline", [Path(sys.argv[1]) / "timeline.jsonl", Path(sys.argv[1]) / "absent"])
    log.log_rollouts(4 + resumed, [Group(uid="0:0", prompt=prompt, samples=(sample,))], [np.zeros(1)])
    log.close()
"""


def test_wandb_without_a_key_writes_an_offline_run_that_resumes_under_its_id(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN, str(run_dir)],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stdout, done.stdout
    run_id = (run_dir / TRACKER_ID).read_text().strip()
    first, second = read_runs(run_dir / "wandb")
    for part in (first, second):
        run = part.run
        assert (run.run_id, run.display_name, run.project) == (run_id, "a-run-seed2-2", "rlpost")
        assert (run.run_group, list(run.tags)) == ("a-run", ["t", "gspo", "seed 2"])
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["train"] == {"lr": 0.125}
        metrics = {metric.glob_name or metric.name: metric for metric in part.metrics}
        assert metrics["*"].step_metric == "step" and metrics["eval/accuracy"].step_metric == "step"
        assert set(tracking.AXES) <= metrics.keys()
        assert metrics["eval/accuracy"].summary.max and metrics["loss/entropy"].summary.min
        assert metrics["reward/mean"].summary.last and not metrics["reward/mean"].summary.min
        (alert,) = part.alerts
        assert alert.title == ("entropy_collapse" * 9)[:63] and alert.level == "ERROR"
        (artifact,) = [a for a in part.artifacts if a.type == "timeline"]  # W&B adds one for each table
        assert artifact.name == f"timeline-{run_id}"
        assert [entry.path for entry in artifact.manifest.contents] == ["timeline.jsonl"]
        assert len(part.tables["rollouts"]) == len(part.tables["eval_rollouts"]) == 1
        lengths = next(row["histogram/length"] for row in part.history if "histogram/length" in row)
        assert lengths["values"] == [2, 0, 1] and lengths["bins"] == [2.5, 3.5, 4.5, 5.5]
    numbers = [row for part in (first, second) for row in part.history if "reward/mean" in row]
    assert [(row["step"], row["reward/mean"], row["total/samples"]) for row in numbers] == [
        (4, 0.75, 64),
        (5, 1.75, 65),
    ]
    assert all("loss/policy" not in row for row in numbers)  # null in the file, absent in a chart
    again = next(row for row in second.history if "eval/accuracy" in row)
    assert (again["step"], again["total/samples"]) == (4, 64), "a resumed run's first rows lie where it stands"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("gsm8k-seed1", "gsm8k"),
        ("gsm8k_s12", "gsm8k"),
        ("gsm8k seed=3", "gsm8k"),
        ("try-gspo", "try-gspo"),
        ("qwen3-s", "qwen3-s"),
        ("seed1", "seed1"),
        ("lr-1e-4", "lr-1e-4"),
    ],
)
def test_seeds_of_an_experiment_share_a_group(name: str, group: str) -> None:
    assert tracking.name_group(name) == group


def test_a_wandb_that_cannot_start_is_one_line_and_the_run_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / TRACKER_ID).write_text("an/impossible id\n")
    said: list[str] = []
    log = writer(tmp_path, say=said.append, wandb="offline")
    log.log(1, {"reward/mean": 1.0})
    log.log(2, {"reward/mean": 1.0})
    log.close()
    assert len(said) == 1 and said[0].startswith("W&B is off: ") and "\n" not in said[0]
    assert len(read_metrics(tmp_path)) == 2


UNREACHABLE = """
import sys
from pathlib import Path
from rlpost.reporting import tracking
from rlpost.config import LoggingConfig
from rlpost.reporting.metrics import MetricsWriter

tracking.INIT_TIMEOUT_S = 2.0
log = MetricsWriter(Path(sys.argv[1]), LoggingConfig(), {}, "a-run")
log.log(1, {"reward/mean": 1.0})
log.close()
"""


def test_a_server_that_does_not_answer_turns_online_into_offline(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "WANDB_BASE_URL": "http://127.0.0.1:9",  # the discard port: nothing listens
            "WANDB_API_KEY": "a" * 40,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("W&B: ") and "logging offline" in line
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert any(record.HasField("history") for record in read_records(file))


class Breaking:
    """Stands for a W&B run whose service died: every call raises."""

    def log(self, values) -> None:
        raise BrokenPipeError("service gone\nsecond line")

    def finish(self, exit_code: int) -> None:
        raise BrokenPipeError("service gone")


def test_a_tracker_that_breaks_later_is_said_once() -> None:
    said: list[str] = []
    tracker = tracking.WandbTracker(Breaking(), said.append)
    tracker.log(1, {"reward/mean": 1.0})
    tracker.log(2, {"reward/mean": 1.0})
    tracker.close()
    assert said == ["W&B stopped: BrokenPipeError: service gone; metrics.jsonl has everything"]


@pytest.mark.parametrize(
    ("wanted", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "online"}, "offline"),  # without a key it would ask
        ("online", {}, "offline"),
        ("online", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_wandb_mode(tmp_path: Path, wanted: str, environment: dict[str, str], mode: str) -> None:
    said: list[str] = []
    assert tracking.choose_wandb_mode(wanted, {"HOME": str(tmp_path), **environment}, said.append) == mode
    went_without_key = "online" in (wanted, environment.get("WANDB_MODE")) and mode == "offline"
    assert len(said) == went_without_key


def test_a_key_in_netrc_counts_for_its_own_server_only(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    environment = {"HOME": str(tmp_path)}
    assert tracking.has_wandb_key(environment)
    assert not tracking.has_wandb_key({**environment, "WANDB_BASE_URL": "https://wandb.example.org"})
    assert not tracking.has_wandb_key({**environment, "NETRC": str(tmp_path / "absent")})


def test_tensorboard_shows_the_same_names(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = writer(tmp_path, tensorboard=True)
    log.log(3, {"reward/mean": 0.5, "loss/policy": float("nan")})
    log.log(4, {"reward/mean": 0.75})
    log.log_histograms(4, {"histogram/length": np.array([3, 3, 5]), "histogram/reward": np.linspace(0.0, 1.0, 50)})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(3, 0.5), (4, 0.75)]
    assert "loss/policy" not in events.Tags()["scalars"]
    (lengths,) = events.Histograms("histogram/length")
    shown = lengths.histogram_value
    assert (lengths.step, shown.num, shown.sum, shown.sum_squares, shown.min, shown.max) == (4, 3, 11, 43, 3, 5)
    assert (shown.bucket, shown.bucket_limit) == ([2, 0, 1], [3.5, 4.5, 5.5])
    (rewards,) = events.Histograms("histogram/reward")
    assert sum(rewards.histogram_value.bucket) == 50 and len(rewards.histogram_value.bucket) == tracking.NUM_BINS

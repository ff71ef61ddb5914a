"""The runner of ``make gpu-check``: however a stage ends, its line and the file say so, and the next one is run."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import runner
from benchmarks.gpu.machine import weigh
from benchmarks.gpu.record import Record, Settings, read
from benchmarks.gpu.stages import PARTS, Part

ROOT = Path(__file__).parents[2]
SMALL = Settings(device="cpu", small=True)


def part(function: str, argument: str | None = None, **changes: Any) -> Part:
    made = Part(
        stage=7,
        name=function.replace("_", "-"),
        module="tests.benchmarks.gpu_parts",
        function=function,
        argument=argument,
        needs_s=1,
        limit_s=480,
    )
    return replace(made, **changes)


def check(parts: list[Part], out: Path, minutes: float = 60.0) -> tuple[int, list[dict[str, Any]]]:
    status = runner.check(SMALL, parts, minutes=minutes, out=out)
    return status, json.loads(out.read_text())["stages"]


def test_a_stage_that_passes_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, (stage,) = check([part("passes", "given")], tmp_path / "deep" / "out.json")
    assert status == 0 and stage["status"] == "PASS" and stage["reason"] is None
    assert stage["figures"] == {"word": "given", "device": "cpu", "small": True, "third": 0.3333}
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("7-passes PASS word=given device=cpu small=True third=0.3333 seconds=")
    assert last.startswith("PASS=1 FAIL=0 SKIP=0 written to ")


@pytest.mark.parametrize(
    ("function", "status", "reason", "figures"),
    [
        ("does_not_hold", "FAIL", "two is not three; nor four", {"after": 1}),
        ("raises", "FAIL", "RuntimeError: no kernel image (exit status 1)", {"before": 2}),
        ("exits", "FAIL", "SystemExit: gives up (exit status 1)", {}),
        ("dies", "FAIL", "about to die (exit status -9)", {"before": 3}),
        ("cannot_apply", "SKIP", "no such thing here", {}),
    ],
)
def test_a_stage_that_ends_otherwise_says_why_and_keeps_its_figures(
    tmp_path: Path, function: str, status: str, reason: str, figures: dict[str, int]
) -> None:
    exit_status, stages = check([part(function), part("passes")], tmp_path / "out.json")
    first, second = stages
    assert (first["status"], first["reason"], first["figures"]) == (status, reason, figures)
    assert exit_status == (1 if status == "FAIL" else 0)
    assert second["status"] == "PASS", "the next stage is run all the same"


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"

    class Impatient(subprocess.Popen):
        """Its time is up as soon as it hangs, however long it took to come to that."""

        def wait(self, timeout: float | None = None) -> int:
            while timeout is not None and self.poll() is None:
                if pid_file.exists() and pid_file.read_text():
                    raise subprocess.TimeoutExpired(self.args, timeout)
                time.sleep(0.05)
            return super().wait()

    slow = part("hangs", str(pid_file), limit_s=15.0)
    monkeypatch.setattr(runner.subprocess, "Popen", Impatient)
    status, (stage,) = check([slow], tmp_path / "out.json", minutes=8)
    assert status == 1 and stage["reason"] == "ended after 15 s, its limit" and stage["figures"] == {"before": 4}
    child = int(pid_file.read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail("its child is still running")


def test_what_does_not_fit_into_the_time_left_is_skipped(tmp_path: Path) -> None:
    long, short = part("passes", needs_s=481.0), part("passes", needs_s=1.0)
    status, stages = check([long, short], tmp_path / "out.json", minutes=8)
    assert [(s["status"], s["reason"]) for s in stages] == [("SKIP", "time"), ("PASS", None)] and status == 0
    status, stages = check([short], tmp_path / "out.json", minutes=0.0)
    assert stages[0]["reason"] == "time", "no time at all"


def test_the_file_is_whole_after_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "out.json", []
    start_part = runner.start_part

    def start(*arguments: Any, **options: Any) -> runner.Outcome:
        seen.append(len(json.loads(out.read_text())["stages"]) if out.exists() else 0)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return start_part(*arguments, **options)

    monkeypatch.setattr(runner, "start_part", start)
    with pytest.raises(KeyboardInterrupt):
        check([part("passes"), part("raises"), part("passes")], out)
    assert seen == [0, 1, 2]
    facts = json.loads(out.read_text())
    assert [s["status"] for s in facts["stages"]] == ["PASS", "FAIL"], "what was measured outlives the interruption"
    assert {"date", "machine", "gpu", "versions", "revision", "device", "minutes"} <= facts.keys()
    assert facts["versions"].keys() >= {"python", "torch", "vllm", "deepspeed"}


def test_a_stage_downloads_nothing_and_sees_no_gpu_that_was_not_asked_for(tmp_path: Path) -> None:
    _, (stage,) = check([part("says_where")], tmp_path / "out.json")
    said = {"HF_HUB_OFFLINE_is": "1", "WANDB_MODE_is": "disabled", "CUDA_VISIBLE_DEVICES_is": ""}
    assert stage["figures"] == said


def test_a_record_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    file = tmp_path / "record.jsonl"
    record = Record(file)
    record.note(a=1)
    record.note(a=2, b=3)
    with file.open("a") as cut:
        cut.write('{"figures": {"c"')
    reported = read(file)
    assert reported.figures == {"a": 2, "b": 3} and not reported.finished and reported.skipped is None
    assert read(tmp_path / "none").figures == {}


def test_the_stages_run_in_their_order_and_fit_into_eight_minutes() -> None:
    stages = list(dict.fromkeys(part.stage for part in PARTS))
    assert stages == [0, 1, 2, 3, 5, 6, 7, 4, 8, 9]
    assert sum(part.needs_s for part in PARTS) <= 480 and all(part.needs_s < part.limit_s for part in PARTS)
    assert len({part.label for part in PARTS}) == len(PARTS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "0,12"], "--only"),
        (["--only", "one"], "--only"),
        (["--device", "tpu"], "invalid choice"),
        (["--device", "cpu"], "--small"),
    ],
)
def test_a_mistyped_command_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        runner.main(arguments)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_make_passes_its_variable_on() -> None:
    command = ["make", "-n", "gpu-check", "GPU_CHECK=--device cpu --small --only 0"]
    own = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # of a make around this one
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=own).stdout
    assert said.splitlines()[-1].endswith("python -m benchmarks.gpu --device cpu --small --only 0")


def test_caches_weigh_what_their_files_do(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kernel").write_bytes(bytes(3 << 20))
    (tmp_path / "link").symlink_to(tmp_path / "a" / "kernel")
    assert weigh(tmp_path) == 3.0 and weigh(tmp_path / "none") == 0.0

"""The run's log: ``metrics.jsonl`` always, W&B and TensorBoard in addition, the rollouts as Parquet.

Owns these files. Computes no metric: it receives numbers under the names in ``rlpost.reporting.metric_names``. Only
``reporting.reporter`` calls it, from one thread; nothing here waits for a network.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rlpost.config import LoggingConfig
from rlpost.reporting import metric_names, rollout_files, tracking
from rlpost.types import Group, Prompt, Sample

FILE = "metrics.jsonl"
TIMES_FILE = "timings.jsonl"
TIME_DIGITS = 3  # of time_s


class MetricsWriter:
    """Appends to the run directory's log. On resume, call :meth:`rewind` before the first :meth:`log`.

    Args:
        run_dir: exists and is writable.
        resolved_config: plain containers, shown by W&B.
        decode: token ids to text, for the rollout files.
        say: receives one line for the user (the progress display's ``message``).
        split_times: values that depend on a clock, or vary for other reasons, go to ``timings.jsonl``, so that
            ``metrics.jsonl`` is identical, byte for byte, for two identical runs. Trackers get both.
    """

    def __init__(
        self,
        run_dir: Path,
        logging: LoggingConfig,
        resolved_config: Mapping[str, Any],
        run_name: str,
        *,
        decode: rollout_files.Decode | None = None,
        say: tracking.Say = print,
        split_times: bool = False,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.num_not_finite = 0
        self._logging = logging
        self._config = resolved_config
        self._run_name = run_name
        self._decode = decode
        self._say = say
        self._warned: set[str] = set()
        self._trackers: list[tracking.Tracker] | None = None  # started by the first line: a rewind comes before it
        names = [FILE, TIMES_FILE] if split_times else [FILE]
        self._logs = [JsonLines(self.run_dir / name) for name in names]
        self._start_clock(lambda row: True)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One line: ``step``, ``time_s`` and the values, which are real numbers (including NumPy's and 0-d tensors).

        JSON has no NaN or infinity: they are written as null, counted in ``log/not_finite`` and reported once per name.
        """
        row: dict[str, float | int | None] = {"step": step, "time_s": round(self.now_s(), TIME_DIGITS)}
        numbers = {name: _to_number(name, value) for name, value in values.items()}
        broken = [name for name, number in numbers.items() if not math.isfinite(number)]
        row |= {name: None if name in broken else number for name, number in numbers.items()}
        if broken:
            row["log/not_finite"] = len(broken)
            self._report(step, broken)
        if len(self._logs) == 1:
            self._logs[0].append(row)
        else:
            self._append_split(row)
        for tracker in self._start_trackers():
            tracker.log(step, {name: number for name, number in row.items() if name != "step" and number is not None})

    def log_rollouts(
        self,
        step: int,
        groups: Sequence[Group],
        advantages: Sequence[Any] | None,
        old_logprobs: Sequence[Sequence[np.ndarray | None]] | None = None,
    ) -> None:
        """Every sample trained in the step as ``rollouts/step-N.parquet``, the first few as a tracker's table."""
        if not self._logging.keep_rollouts:  # then only the table's responses are decoded
            groups = groups[: self._logging.table_rows]
        rows = rollout_files.to_rows(groups, advantages, self._decode, old_logprobs)
        if self._logging.keep_rollouts:
            rollout_files.write(rollout_files.file_of(self.run_dir, step), rows)
        if self._logging.table_rows:
            table = rollout_files.to_table(rows, self._logging.table_rows)
            for tracker in self._start_trackers():
                tracker.log_table(step, "rollouts", table)

    def log_histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """The values whose distributions the trackers show, by name."""
        for tracker in self._start_trackers():
            tracker.log_histograms(step, values)

    def log_evaluation(self, step: int, samples: Sequence[tuple[Prompt, Sample]]) -> None:
        """The first few responses of an evaluation as a tracker's table, the same problems each time."""
        if not self._logging.table_rows:
            return
        first = sorted(samples, key=lambda pair: (len(pair[1].uid), pair[1].uid, pair[1].index))
        groups = [
            Group(uid=sample.uid, prompt=prompt, samples=(sample,))
            for prompt, sample in first[: self._logging.table_rows]
        ]
        table = rollout_files.to_table(rollout_files.to_rows(groups, None, self._decode), len(groups))
        for tracker in self._start_trackers():
            tracker.log_table(step, "eval_rollouts", table)

    def alert(self, title: str, text: str) -> None:
        """Send an urgent message to the running trackers."""
        for tracker in self._trackers or []:
            tracker.alert(title, text)

    def keep_files(self, name: str, files: Sequence[Path]) -> None:
        """Pass files of the run, if they exist, to the trackers that store files."""
        files = [file for file in files if file.exists()]
        for tracker in self._trackers or [] if files else []:
            tracker.keep_files(name, files)

    def now_s(self) -> float:
        """Seconds since the run began, as in ``time_s``."""
        return time.monotonic() - self._started

    def rewind(self, step: int | None, *, evaluated_step: int | None = None) -> float:
        """Drop everything logged for later steps: a run resumed at ``step`` repeats them.

        None: a run without a checkpoint starts over, nothing is kept. Also drops an evaluation later than
        ``evaluated_step``, the last one in the checkpoint (None: all stay), and everything logged only at a run's end.
        """

        def is_kept(row: Mapping[str, Any]) -> bool:
            is_evaluation = any(name.startswith("eval/") for name in row)
            unknown = evaluated_step is not None and is_evaluation and row["step"] > evaluated_step
            at_the_end = any(name.startswith("replay/") for name in row)
            return step is not None and row["step"] <= step and not unknown and not at_the_end

        assert self._trackers is None, "rewind comes before the first line is logged"
        time_s = self._start_clock(is_kept)
        rollout_files.remove_after(self.run_dir, step or 0)
        return time_s

    def close(self, *, failed: bool = False) -> None:
        """Flush and close the trackers. Safe to call twice."""
        for log in self._logs:
            log.close()
        for tracker in self._trackers or []:
            tracker.close(failed=failed)
        self._trackers = []

    def _start_clock(self, keep: Callable[[Mapping[str, Any]], bool]) -> float:
        """Cut the logs to the kept lines; ``time_s`` continues from the last of them, which is returned."""
        last = [log.cut(keep, self._say) for log in self._logs][-1]
        time_s = float((last or {}).get("time_s", 0.0))
        self._started = time.monotonic() - time_s
        return time_s

    def _append_split(self, row: Mapping[str, Any]) -> None:
        varying = {name for name in row if name != "step" and metric_names.varies(name)}
        rest = {name: value for name, value in row.items() if name not in varying}
        if len(rest) > 1:  # more than the step alone
            self._logs[0].append(rest)
        self._logs[1].append({"step": row["step"], **{name: row[name] for name in row if name in varying}})

    def _report(self, step: int, broken: Sequence[str]) -> None:
        self.num_not_finite += len(broken)
        for name in broken:
            if name not in self._warned:
                self._warned.add(name)
                self._say(f"warning: {name} is not a finite number at step {step}; written as null and counted")

    def _start_trackers(self) -> list[tracking.Tracker]:
        if self._trackers is None:
            self._trackers = []
            mode = tracking.choose_wandb_mode(self._logging.wandb, os.environ, self._say)
            if mode != "disabled":
                wandb = tracking.WandbTracker.start(
                    self.run_dir,
                    mode=mode,
                    project=self._logging.project,
                    name=self._run_name,
                    group=self._logging.group or tracking.name_group(str(self._config.get("name", self._run_name))),
                    tags=tracking.choose_tags(self._logging.tags, self._config),
                    config=self._config,
                    axes=self._read_axes(),
                    say=self._say,
                )
                self._trackers += [wandb] if wandb else []
            if self._logging.tensorboard:
                tensorboard = tracking.TensorboardTracker.start(self.run_dir, say=self._say)
                self._trackers += [tensorboard] if tensorboard else []
        return self._trackers

    def _read_axes(self) -> dict[str, float]:
        """The last logged value on each axis of a curve."""
        steps = read_steps(self.run_dir)
        return {name: step[name] for step in steps for name in tracking.AXES if name in step}


class JsonLines:
    """A log of one JSON object per line with its ``step``. The next cut removes invalid lines, such as one torn by a
    kill or the zeros left by a power failure."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()  # a killed process loses nothing; only a power failure could

    def cut(self, keep: Callable[[Mapping[str, Any]], bool], say: tracking.Say = print) -> Mapping[str, Any] | None:
        """Keep the lines for which ``keep(row)``; returns the last of them, None if there are none."""
        self.close()
        if not self._path.exists():
            self._path.touch()
            return None
        lines = self._path.read_bytes().splitlines(keepends=True)
        rows = [(line, row) for line in lines if (row := _read_row(line)) is not None]
        unreadable = sum(line.endswith(b"\n") for line in lines) - len(rows)
        if unreadable:
            say(f"warning: dropped {unreadable} unreadable lines of {self._path}")
        kept = [(line, row) for line, row in rows if keep(row)]
        if len(kept) < len(lines):
            shorter = self._path.with_suffix(".unfinished")
            with shorter.open("wb") as file:
                file.writelines(line for line, _ in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(shorter, self._path)
        return kept[-1][1] if kept else None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _read_row(line: bytes) -> Mapping[str, Any] | None:
    """A complete line's object; None for a torn one, and for anything that is not an object with a step."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:  # including text that is not UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """All complete lines of a run's log, oldest first."""
    return read_rows(Path(run_dir) / FILE)


def read_steps(run_dir: Path) -> list[dict[str, float]]:
    """Everything logged for each step as one mapping with ``step``, in order; step 0 is what came before the first.

    Includes ``timings.jsonl``, without null values; empty if nothing was logged. The run may be active.
    """
    steps: dict[int, dict[str, float]] = {}
    for name in (FILE, TIMES_FILE):
        path = Path(run_dir) / name
        if path.exists():
            for row in read_rows(path):
                values = {key: value for key, value in row.items() if value is not None}
                steps.setdefault(row["step"], {}).update(values)
    return [steps[step] for step in sorted(steps)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log, oldest first."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _to_number(name: str, value: Any) -> float | int:
    if isinstance(value, bool | int | np.integer):
        return int(value)
    if isinstance(value, str | bytes) or value is None:
        raise TypeError(f"metric {name}: got {value!r}, not a number")
    return float(value)

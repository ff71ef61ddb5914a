"""Trackers that show a run's metrics elsewhere: W&B and TensorBoard. The only file that imports either, except for
``viewing.dashboard``, which arranges W&B's panels.

A tracker never ends or delays a run: an error is reported once, in one line, and the tracker then stays silent
(``metrics.jsonl`` always has everything). Nothing here ever prompts the user. Only ``reporting.metrics`` calls it.
"""

from __future__ import annotations

import netrc
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

from rlpost.durable.run_dir import TRACKER_ID

Say = Callable[[str], None]
Table = tuple[list[str], list[list[Any]]]  # column names, rows

AXES = ("step", "total/samples", "total/tokens", "time_s")  # possible x axes of a curve; in every row
SUMMARIES = {  # what W&B's table of runs shows for a metric; the last value for all others
    "eval/accuracy": "max,last",
    "eval/pass_at_k": "max,last",
    "reward/mean": "max,last",
    "mismatch/canary": "max,last",
    "mismatch/canary_max": "max,last",
    "loss/entropy": "min,last",
    "rollout/idle_share": "mean,last",
    "rollout/consumed_tokens_per_s": "mean,max,last",
}
NUM_BINS = 32
TITLE_CHARACTERS = 63  # of a W&B alert

INIT_TIMEOUT_S = 30.0  # an unreachable server may cost this much once; then the run is tracked offline


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name."""

    def log_table(self, step: int, name: str, table: Table) -> None: ...

    def log_histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """The values whose distributions are shown, by name; none of them empty."""

    def alert(self, title: str, text: str) -> None:
        """An urgent message."""

    def keep_files(self, name: str, files: Sequence[Path]) -> None:
        """Store files of the run with it."""

    def close(self, *, failed: bool = False) -> None: ...


class WandbTracker:
    """One W&B run, with the same id when the run directory is resumed. ``step`` is the axis of every metric.

    A resumed run logs the steps after its checkpoint again under the same id: W&B shows them as additional points at
    those steps. Offline parts have the same id; ``wandb sync`` joins them.
    """

    def __init__(self, run: Any, say: Say, axes: Mapping[str, float] | None = None) -> None:
        """``axes``: the resumed run's position, so that its first rows are placed correctly."""
        self._run: Any = run
        self._say = say
        self._axes = dict.fromkeys(AXES, 0.0) | dict(axes or {})

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        mode: str,
        project: str,
        name: str,
        group: str | None,
        tags: Sequence[str],
        config: Mapping[str, Any],
        axes: Mapping[str, float],
        say: Say,
    ) -> WandbTracker | None:
        """``mode`` is online or offline. None if W&B cannot start, after reporting why."""
        options = {"project": project, "name": name, "group": group, "tags": list(tags), "config": dict(config)}
        try:
            import wandb

            run = _start_wandb(wandb, run_dir, mode, options, say)
            for axis in AXES:
                run.define_metric(axis, hidden=axis == "step")
            run.define_metric("*", step_metric="step")
            for metric, summary in SUMMARIES.items():
                run.define_metric(metric, step_metric="step", summary=summary)
        except Exception as error:  # a tracker's failure is a message, never the end of the run
            say(f"W&B is off: {_one_line(error)}; metrics.jsonl has everything")
            return None
        return cls(run, say, axes)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._axes |= {name: value for name, value in values.items() if name in AXES} | {"step": step}
        self._guard(lambda run: run.log({**values, **self._axes}))

    def log_table(self, step: int, name: str, table: Table) -> None:
        import wandb

        columns, rows = table
        self._guard(lambda run: run.log({name: wandb.Table(columns=columns, data=rows), "step": step}))

    def log_histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        import wandb

        binned = {name: wandb.Histogram(np_histogram=_bin(array)) for name, array in values.items()}
        self._guard(lambda run: run.log({**binned, "step": step}))

    def alert(self, title: str, text: str) -> None:
        self._guard(lambda run: run.alert(title=title[:TITLE_CHARACTERS], text=text, level="ERROR"))

    def keep_files(self, name: str, files: Sequence[Path]) -> None:
        import wandb

        def keep(run: Any) -> None:
            artifact = wandb.Artifact(f"{name}-{run.id}", type=name)
            for file in files:
                artifact.add_file(str(file))
            run.log_artifact(artifact)

        self._guard(keep)

    def close(self, *, failed: bool = False) -> None:
        self._guard(lambda run: run.finish(exit_code=1 if failed else 0))
        self._run = None

    def _guard(self, act: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            self._run = None
            self._say(f"W&B stopped: {_one_line(error)}; metrics.jsonl has everything")


class TensorboardTracker:
    """Scalars and histograms as event files below ``run_dir/tensorboard``, written without importing torch."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def start(cls, run_dir: Path, *, say: Say) -> TensorboardTracker | None:
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            say(f"TensorBoard is off: {_one_line(error)}; pip install rlpost[tensorboard]")
            return None
        return cls(EventFileWriter(str(run_dir / "tensorboard")))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._add(step, summary)

    def log_table(self, step: int, name: str, table: Table) -> None:
        """Tables are left to W&B and the Parquet files."""

    def log_histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

        shown = []
        for name, array in values.items():
            counts, edges = _bin(array)
            histogram = HistogramProto(
                min=float(array.min()),
                max=float(array.max()),
                num=len(array),
                sum=float(array.sum()),
                sum_squares=float(np.square(array, dtype=np.float64).sum()),
                bucket_limit=edges[1:].tolist(),
                bucket=counts.tolist(),
            )
            shown.append(Summary.Value(tag=name, histo=histogram))
        self._add(step, Summary(value=shown))

    def alert(self, title: str, text: str) -> None:
        """Left to W&B; the run's output and ``warnings.jsonl`` also have it."""

    def keep_files(self, name: str, files: Sequence[Path]) -> None:
        """Left to W&B: the files are in the run directory, beside the event files."""

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()

    def _add(self, step: int, summary: Any) -> None:
        import time

        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def choose_wandb_mode(wanted: str, environment: Mapping[str, str], say: Say) -> str:
    """online, offline or disabled, from ``logging.wandb``, W&B's own WANDB_MODE and whether there is a key.

    ``auto`` is online with a key, else offline; without a key nothing goes online, since W&B would ask for one.
    """
    if wanted == "auto":
        wanted = environment.get("WANDB_MODE", "") or ("online" if has_wandb_key(environment) else "offline")
    if wanted == "online" and not has_wandb_key(environment):
        say("W&B: got logging.wandb=online; expected a key; logging offline, run `wandb login` or set WANDB_API_KEY")
        return "offline"
    return {"dryrun": "offline", "run": "online"}.get(wanted, wanted)


def has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Whether W&B could log in without asking: a key or token in the environment, or its server in the netrc file."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    home = Path(environment.get("HOME", "~")).expanduser()
    files = [Path(environment["NETRC"])] if environment.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for file in files:
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def name_group(name: str) -> str:
    """The experiment of a run: its name without the seed (``gsm8k-seed1``, ``gsm8k_s1``: ``gsm8k``)."""
    return re.sub(r"[-_. ](seed|s)[-_=]?\d+$", "", name) or name


def choose_tags(tags: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """The user's tags, then the algorithm and the seed, without duplicates."""
    own = [str(config["algo"]["name"]), f"seed {config['seed']}"] if "algo" in config else []
    return list(dict.fromkeys([*tags, *own]))


def _bin(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(counts, edges): one bin per value for a few whole numbers, else NUM_BINS of equal width."""
    if np.issubdtype(values.dtype, np.integer) and values.max() - values.min() < NUM_BINS:
        edges = np.arange(int(values.min()), int(values.max()) + 2) - 0.5
        return np.histogram(values, bins=edges)
    return np.histogram(values, bins=NUM_BINS)


def _start_wandb(wandb: Any, run_dir: Path, mode: str, options: dict[str, Any], say: Say) -> Any:
    """An initialized run; if the server does not respond in time, online becomes offline."""
    options = options | {"dir": str(run_dir), "id": _run_id(run_dir), "resume": "allow", "save_code": False}
    # console capture would interfere with the progress display; the banner would break its lines
    settings = wandb.Settings(init_timeout=INIT_TIMEOUT_S, console="off", silent=True, disable_git=True)
    wandb.setup(settings=settings)  # before init, otherwise logging in prints a line of its own
    try:
        return wandb.init(**options, mode=mode, settings=settings)
    except Exception as error:
        if mode != "online":
            raise
        say(f"W&B: {_one_line(error)}; logging offline, `wandb sync` sends it later")
        wandb.teardown(exit_code=1)  # the partially started run still holds the id
        return wandb.init(**options, mode="offline", settings=settings)


def _run_id(run_dir: Path) -> str:
    """The id stored in the run directory, so that a resumed run continues under the same one."""
    file = run_dir / TRACKER_ID
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

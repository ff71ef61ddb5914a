"""Trackers that show a run's metrics elsewhere: W&B and TensorBoard. The only file that imports either.

A tracker never ends or delays a run: what goes wrong is said in one line, once, and the tracker goes quiet
(``metrics.jsonl`` always has everything). Nothing here ever asks a question. ``reporting.metrics`` is the only caller.
"""

from __future__ import annotations

import netrc
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

Say = Callable[[str], None]
Table = tuple[list[str], list[list[Any]]]  # column names, rows

WANDB_ID_FILE = "wandb_run_id"
INIT_TIMEOUT_S = 30.0  # an unreachable server may cost this much once, then the run is tracked offline


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Finite numbers by name."""

    def log_table(self, step: int, name: str, table: Table) -> None: ...

    def close(self, *, failed: bool = False) -> None: ...


class WandbTracker:
    """One W&B run; the same id when the run directory is resumed. ``step`` is the axis of every metric.

    A resumed run logs the steps after its checkpoint again under the same id: W&B shows them as more points at those
    steps. Offline parts are joined by ``wandb sync`` in the order they were made.
    """

    def __init__(self, run: Any, say: Say) -> None:
        self._run: Any = run
        self._say = say

    @classmethod
    def start(
        cls,
        run_dir: Path,
        *,
        mode: str,
        project: str,
        name: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
        say: Say,
    ) -> WandbTracker | None:
        """``mode`` is online or offline. None when W&B cannot start, after saying why."""
        try:
            import wandb

            run = _start_wandb(wandb, run_dir, mode, project, name, tags, config, say)
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")
        except Exception as error:  # any failure of a tracker is a message, not the end of the run
            say(f"W&B is off: {_one_line(error)}; metrics.jsonl has everything")
            return None
        return cls(run, say)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._guard(lambda run: run.log({**values, "step": step}))

    def log_table(self, step: int, name: str, table: Table) -> None:
        import wandb

        columns, rows = table
        self._guard(lambda run: run.log({name: wandb.Table(columns=columns, data=rows), "step": step}))

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
    """Scalars and the rollout table as event files below ``run_dir/tensorboard``, written without importing torch."""

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
        """Tables are left to W&B and to the Parquet files."""

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
        say("W&B: got logging.wandb=online; expected a key; logging offline, `wandb login` or WANDB_API_KEY mends it")
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


def _start_wandb(
    wandb: Any,
    run_dir: Path,
    mode: str,
    project: str,
    name: str,
    tags: Sequence[str],
    config: Mapping[str, Any],
    say: Say,
) -> Any:
    """An initialised run; a server that does not answer in time turns online into offline."""
    options = {
        "dir": str(run_dir),
        "project": project,
        "name": name,
        "id": _run_id(run_dir),
        "resume": "allow",
        "tags": list(tags),
        "config": dict(config),
        "save_code": False,
    }
    # console capture would fight the progress display; the banner would break its lines
    settings = wandb.Settings(init_timeout=INIT_TIMEOUT_S, console="off", silent=True, disable_git=True)
    wandb.setup(settings=settings)  # before init, or logging in prints a line of its own
    try:
        return wandb.init(**options, mode=mode, settings=settings)
    except Exception as error:
        if mode != "online":
            raise
        say(f"W&B: {_one_line(error)}; logging offline, `wandb sync` sends it later")
        wandb.teardown(exit_code=1)  # the half-started run still holds the id
        return wandb.init(**options, mode="offline", settings=settings)


def _run_id(run_dir: Path) -> str:
    """The id kept in the run directory, so that a resumed run goes on under the same one."""
    file = run_dir / WANDB_ID_FILE
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""``rlpost watch``: a run seen from outside, live in a terminal. Only reads the run's files.

Once a second it reads ``status.json`` (the current activity), the metrics, the newest file in ``rollouts/`` and
``warnings.jsonl``, and draws one frame; unchanged files are not read again. The run does not know that it is watched.
``--once`` prints a single frame, for a pipe or a script.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from rlpost.durable.run_state import CONFIG_FILE
from rlpost.errors import RunError, explain
from rlpost.reporting import metrics
from rlpost.reporting.advice import read_warnings
from rlpost.reporting.progress import PHASES, RECENT_STEPS, duration, interval, percent
from rlpost.reporting.status import read_status
from rlpost.viewing.run_list import find_state, is_locked, is_run

if TYPE_CHECKING:
    from rich.console import RenderableType

SILENT_S = 10.0  # a worker without progress for this long is shown as such
BLOCKS = "▁▂▃▄▅▆▇█"
EVERY_S = 1.0  # between two reads of the files
BAR_WIDTH, LABEL_WIDTH = 24, 18
CURVE_WIDTH, STORY_WIDTH = 40, 42  # in a narrow window, the curve shrinks first
NUM_RESPONSES, RESPONSE_LINES = 3, 2
NUM_WARNINGS = 4
RESPONSE_COLUMNS = ["uid", "prompt", "response", "reward", "finish_reason", "policy_versions", "token_ids"]

Format = Callable[[float], str]

# metric -> label of the curve, format of its values
CURVES: dict[str, tuple[str, Format]] = {
    "eval/accuracy": ("accuracy", percent),
    "eval/loss": ("held-out loss", "{:.4g} nats".format),
    "loss/nll": ("loss", "{:.4g} nats".format),
    "reward/mean": ("reward", "{:.3f}".format),
    "rollout/length/admitted_mean": ("response length", "{:.0f} tokens".format),
    "rollout/truncated_share": ("cut at the limit", percent),
    "loss/entropy": ("entropy", "{:.3g} nats".format),
    "loss/grad_norm": ("gradient norm", "{:.3g}".format),
    "mismatch/lag_0/abs_log_ratio": ("mismatch", "{:.2g} nats".format),
    "rollout/consumed_tokens_per_s": ("trained tokens/s", "{:,.0f}".format),
    "rollout/idle_share": ("engine idle", percent),
    "rollout/carried_share": ("carried over", percent),
}


class View:
    """What is known about one run; :meth:`look` updates it."""

    def __init__(self, run: Path) -> None:
        """Raises RunError if there is no run."""
        if not is_run(run):
            raise RunError(explain("watch", str(run), "a run directory", "check the path; `rlpost runs` lists them"))
        self.run = run
        self.status: dict[str, Any] = {}
        self.state = ""
        self.steps: list[dict[str, float]] = []
        self.responses: list[dict[str, Any]] = []
        self.responses_step = 0
        self.warnings: list[dict[str, Any]] = []
        self._seen: dict[str, tuple[int, int]] = {}

    def look(self) -> None:
        self.status = read_status(self.run)
        self.state = find_state(self.run, self.status)
        if self._changed(metrics.FILE, metrics.TIMES_FILE):
            self.steps = metrics.read_steps(self.run)
        if self._changed("warnings.jsonl"):
            self.warnings = read_warnings(self.run)
        newest = max((self.run / "rollouts").glob("step-*.parquet"), default=None)
        if newest is not None and self._changed(f"rollouts/{newest.name}"):
            try:
                self.responses = _read_responses(newest)
                self.responses_step = int(newest.stem.removeprefix("step-"))
            except FileNotFoundError:  # a resume has just removed it
                self._seen.clear()

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        if "steps" in self.status:
            return int(self.status["steps"])
        return int(yaml.safe_load((self.run / CONFIG_FILE).read_text())["steps"])

    @property
    def step(self) -> int:
        done = max((int(row["step"]) for row in self.steps if "loss/tokens" in row), default=0)
        return int(self.status.get("step", done)) if self.state == "running" else done

    def _changed(self, *names: str) -> bool:
        changed = False
        for name in names:
            path = self.run / name
            about = path.stat() if path.exists() else None
            seen = (about.st_mtime_ns, about.st_size) if about else (0, 0)
            changed |= seen != self._seen.get(name, (0, 0))
            self._seen[name] = seen
        return changed


def watch(run: Path, *, once: bool = False, every_s: float = EVERY_S) -> None:
    """Draw until the run ends or the user exits with Ctrl-C; ``once``: a single frame."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if is_starting(run):
        console.print(f"{run}  starting: nothing is written yet", markup=False)
        if once or not console.is_terminal:
            return
        try:
            while is_starting(run):
                time.sleep(every_s)
        except KeyboardInterrupt:
            return
    view = View(run)
    view.look()
    if once or not console.is_terminal:
        console.print(draw(view, console.width))
        return
    try:
        with Live(draw(view, console.width), console=console, screen=True, auto_refresh=False) as live:
            while view.state == "running":
                time.sleep(every_s)
                view.look()
                live.update(draw(view, console.width), refresh=True)
    except KeyboardInterrupt:
        left = True
    else:
        left = False
    console.print(draw(view, console.width))
    if left:
        console.print("the run continues unwatched" if view.state == "running" else "")


def is_starting(run: Path) -> bool:
    """Whether a process holds the directory and has not written its configuration yet: it is importing libraries and
    loading a model."""
    return not is_run(run) and is_locked(run / "lock")


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(view: View, width: int) -> RenderableType:
    """One frame, at most ``width`` columns wide."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text.assemble((str(view.run), "bold"), "  ", (view.state, _color(view.state)))]
    parts += [Text(line) for line in _now(view)]
    for section in (_curves(view, width), _warnings(view), _responses(view, width)):  # a short window cuts off the end
        if section is not None:
            parts += [Text(""), section]
    return Group(*parts)


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """The curve in at most ``width`` characters: each is the mean of its share of the values, from the lowest block
    (the minimum) to the highest; a constant curve is drawn in the middle."""
    if len(values) > width:
        edges = [round(n * len(values) / width) for n in range(width + 1)]
        parts = [values[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        values = [sum(part) / len(part) for part in parts]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high == low:
        return BLOCKS[len(BLOCKS) // 2] * len(values)
    return "".join(BLOCKS[round((v - low) / (high - low) * (len(BLOCKS) - 1))] for v in values)


def _now(view: View) -> list[str]:
    status, total = view.status, view.num_steps
    seconds = view.steps[-1].get("time_s", 0.0) if view.steps else 0.0
    if view.state != "running":
        words = {
            "finished": f"all {total} steps done",
            "waiting": f"stopped after step {view.step} of {total}; run the same command to resume",
            "failed": f"ended after step {view.step} of {total}: {status.get('reason', '')}",
            "killed": f"its process is gone, after step {view.step} of {total}; run the same command to resume",
        }
        return [f"{words[view.state]}; {duration(seconds)} in all"]
    phase = str(status.get("phase", "start"))
    since = time.time() - float(status.get("phase_started_at", time.time()))
    number = f"after step {view.step}" if phase in ("start", "eval", "save") else f"step {view.step + 1}"
    lines = [f"{number} of {total}: {PHASES.get(phase, phase)} ({duration(max(0.0, since))})"]
    done, wanted = int(status.get("done", 0)), int(status.get("wanted", 0))
    if wanted:
        what = "responses" if phase == "eval" else "groups"
        engine = f"  {status['running']} samples running, {status['open_groups']} groups open"
        lines.append(f"{_bar(done / wanted)} {done}/{wanted} {what}{'' if phase == 'eval' else engine}")
    lines += [_worker(row) for row in status.get("workers", [])]
    left = status.get("left_s") or _left_s(view)
    ending = f"about {duration(left)} left" if left is not None else "time left: known after the first step"
    lines.append(f"{_bar(view.step / max(1, total))} {view.step}/{total} steps  {duration(seconds)} so far, {ending}")
    return lines


def _worker(row: Mapping[str, Any]) -> str:
    silent = f", no progress for {duration(row['silent_s'])}" if row["silent_s"] >= SILENT_S else ""
    return f"worker {row['rank']} on {row['host']} (process {row['pid']}): {row['phase']}{silent}"


def _left_s(view: View) -> float | None:
    times = [row["time/step"] for row in view.steps if "time/step" in row][-RECENT_STEPS:]
    return median(times) * (view.num_steps - view.step) if times else None


def _bar(share: float) -> str:
    full = round(BAR_WIDTH * min(1.0, share))
    return "█" * full + "░" * (BAR_WIDTH - full)


def _curves(view: View, width: int) -> RenderableType | None:
    from rich.text import Text

    longest = max((sum(name in row for row in view.steps) for name in CURVES), default=0)
    room = max(8, min(CURVE_WIDTH, longest, width - LABEL_WIDTH - STORY_WIDTH))
    lines = []
    for name, (label, form) in CURVES.items():
        rows = [row for row in view.steps if name in row]
        values = [row[name] for row in rows]
        if not values or not any(values):
            continue
        story = form(values[-1]) if len(values) == 1 else f"{form(values[0])} → {form(values[-1])}"
        if name == "eval/accuracy":
            story += f" ({interval(rows[-1]['eval/accuracy_low'], rows[-1]['eval/accuracy_high'])})"
        curve = (f"{sparkline(values, room):<{room}}", "cyan")
        lines.append(Text.assemble(f"{label:<{LABEL_WIDTH}}", curve, f"  {story}", no_wrap=True, overflow="ellipsis"))
    return _stack(lines)


def _responses(view: View, width: int) -> RenderableType | None:
    from rich.padding import Padding
    from rich.text import Text

    if not view.responses:
        return None
    lines: list[RenderableType] = [Text(f"responses trained in step {view.responses_step}", "bold")]
    for row in view.responses:
        reward = "no reward" if row["reward"] is None else f"reward {row['reward']:.3g}"
        versions = sorted(set(row["policy_versions"]))
        by = f"policy {versions[0]}" if len(versions) == 1 else f"policies {versions[0]} to {versions[-1]}"
        about = f"{reward}, {len(row['token_ids'])} tokens, {row['finish_reason']}" + (f", {by}" if versions else "")
        text = f"{printable(row['prompt'])} → {printable(row['response'])}"
        room = RESPONSE_LINES * (width - 2)
        good = row["reward"] is not None and row["reward"] > 0
        lines.append(Text(about, "green" if good else "yellow"))
        shown = Text(text if len(text) <= room else text[: room - 1] + "…", overflow="fold")
        lines.append(Padding(shown, (0, 0, 0, 2)))
    return _stack(lines)


def _warnings(view: View) -> RenderableType | None:
    from rich.text import Text

    if not view.warnings:
        return None
    lines = [Text("warnings", "bold")]
    shown = view.warnings[-NUM_WARNINGS:]
    if len(shown) < len(view.warnings):
        lines.append(Text(f"({len(view.warnings) - len(shown)} earlier ones: warnings.jsonl)"))
    for warning in shown:
        style = "red" if warning["wakes"] else "yellow"
        lines.append(Text.assemble((f"step {warning['step']}: ", style), warning["text"]))
    return _stack(lines)


def _stack(lines: Sequence[RenderableType]) -> RenderableType | None:
    from rich.console import Group

    return Group(*lines) if lines else None


def _color(state: str) -> str:
    return {"running": "green", "finished": "green", "waiting": "yellow"}.get(state, "red")


def printable(text: str) -> str:
    """On one line, without anything that a terminal would interpret: a model may write any character."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "�" for c in text.strip())


def _read_responses(file: Path) -> list[dict[str, Any]]:
    """The best response in the file, the worst, and the last, from different prompts if there are several."""
    import pyarrow.parquet as parquet

    rows: list[dict[str, Any]] = parquet.read_table(file, columns=RESPONSE_COLUMNS).to_pylist()
    scored = [row for row in rows if row["reward"] is not None]
    chosen: list[dict[str, Any]] = []
    for pick in (lambda r: max(r, key=_reward), lambda r: min(r, key=_reward), lambda r: r[-1]):
        others = [row for row in scored or rows if row["uid"] not in {c["uid"] for c in chosen}]
        if others:
            chosen.append(pick(others))
    return chosen[:NUM_RESPONSES]


def _reward(row: Mapping[str, Any]) -> float:
    return float("-inf") if row["reward"] is None else float(row["reward"])

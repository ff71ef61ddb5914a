"""What a person watching a run sees: the phase, the step's groups, accuracy so far, time left.

Owns the terminal while a run lasts; knows nothing about the loop. ``reporting.reporter`` and ``evaluate`` call it. On a
terminal, one live block is redrawn by rich's own thread four times a second, so a call costs only a few assignments;
elsewhere there is one plain line per step; ``quiet`` prints only the texts given to :meth:`Progress.message`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING, TextIO

from rlpost.evaluation.intervals import Interval

if TYPE_CHECKING:
    from rich.console import RenderableType

REDRAWS_PER_S = 4
BAR_WIDTH = 24
RECENT_STEPS = 20  # steps used to estimate the time left: lengths change while a policy learns

PHASES = {
    "start": "starting",
    "generate": "generating",
    "score": "waiting for rewards",
    "update": "updating the policy",
    "publish": "copying weights into the engine",
    "save": "saving a checkpoint",
    "recover": "restarting workers",
    "eval": "evaluating",
}


class Progress:
    """One run's display. Use as a context manager, or call :meth:`close`.

    Args:
        kind: ``logging.progress``: auto, live, lines or quiet.
        out: where to print; None: standard output.
        clock: seconds, monotonic; tests pass their own.
    """

    def __init__(self, kind: str = "auto", *, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._out = out or sys.stdout
        self._kind = ("live" if self._out.isatty() else "lines") if kind == "auto" else kind
        self._clock = clock
        self._pace = Pace(clock)
        self._total_steps = 0
        self._step = 0
        self._phase = "start"
        self._phase_started = clock()
        self._reader_may_leave = False
        self._admitted = self._wanted = self._running = self._open = 0
        self._accuracies: list[tuple[float, float, float]] = []
        self._reward: float | None = None
        self._live = None
        if self._kind == "live":
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._out)
            self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=REDRAWS_PER_S)
            self._live.start()

    def start(self, total_steps: int, *, first_step: int = 0, evals_left: int = 0) -> None:
        """The run goes from ``first_step`` to ``total_steps``; ``evals_left`` counts the evaluations still to come."""
        self._total_steps, self._step = total_steps, first_step
        self._pace.start(total_steps - first_step, evals_left)

    def phase(self, name: str) -> None:
        """A new phase begins; a name in :data:`PHASES` or any other text."""
        self._phase, self._phase_started = name, self._clock()
        self._admitted = self._wanted = 0
        self._pace.phase(name)

    def rollout(self, admitted: int, wanted: int, running: int, open_groups: int = 0) -> None:
        """``admitted`` of the step's ``wanted`` groups, samples in the engine, open groups."""
        self._admitted, self._wanted, self._running, self._open = admitted, wanted, running, open_groups

    def evaluating(self, finished: int, wanted: int) -> None:
        """Responses of an evaluation finished so far."""
        self._admitted, self._wanted, self._running, self._open = finished, wanted, 0, 0

    def step_done(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        metrics = metrics or {}
        self._step = step
        self._reward = metrics.get("reward/mean", self._reward)
        self._pace.step_done()
        if self._kind == "lines":
            self._print(self._step_line(metrics))

    def evaluation(self, accuracy: Interval, by_source: Mapping[str, Interval]) -> None:
        """Accuracy of all problems, and of each source's where there are several."""
        self._accuracies.append((accuracy.mean, accuracy.low, accuracy.high))
        if self._kind != "quiet":
            self.message(f"evaluation after step {self._step}: accuracy {_describe(accuracy)}")
            for name, own in by_source.items():
                self.message(f"  {name}: {_describe(own)}")

    def loss_evaluation(self, loss: float) -> None:
        """``loss``: on held-out examples, nats per token."""
        if self._kind != "quiet":
            self.message(f"evaluation after step {self._step}: loss {loss:.4f}")

    def left_s(self) -> float | None:
        """Estimated seconds until the run ends; None before its first step."""
        return self._pace.left_s()

    def message(self, text: str) -> None:
        """Print a line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def close(self) -> None:
        """Remove the live block; nothing is drawn afterwards. Safe to call twice."""
        if self._live is not None:
            self._live.transient = True
            self._live.stop()
            self._live, self._kind = None, "lines"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def stopping(self, text: str) -> None:
        """A stop request: from now on, a closed output (Ctrl-C ends a whole pipe) no longer ends anything."""
        self._reader_may_leave = True
        self.message(text)

    def _print(self, text: str) -> None:
        try:
            print(text, file=self._out, flush=True)
        except BrokenPipeError:
            if not self._reader_may_leave:
                raise

    def _step_line(self, metrics: Mapping[str, float]) -> str:
        parts = [f"step {self._step}/{self._total_steps}"]
        shown = (
            ("loss/nll", "nll {:.4f}"),
            ("reward/mean", "reward {:.3f}"),
            ("rollout/length/admitted_mean", "{:.0f} tokens per response"),
            ("rollout/consumed_tokens_per_s", "{:,.0f} tokens/s"),
            ("rollout/carried_share", "{:.0%} carried over"),
            ("rollout/idle_share", "{:.0%} idle"),
            ("time/step", "{:.1f} s"),
        )
        parts += [form.format(metrics[name]) for name, form in shown if metrics.get(name) is not None]
        left = self._pace.left_s()
        return "  ".join([*parts, *([f"{duration(left)} left"] if left is not None else [])])

    def _draw(self) -> RenderableType:
        from rich.text import Text

        phase_s = self._clock() - self._phase_started
        between_steps = self._phase in ("start", "eval", "save")
        number = f"after step {self._step}" if between_steps else f"step {self._step + 1}"
        lines = [f"{number} of {self._total_steps}: {PHASES.get(self._phase, self._phase)} ({phase_s:.0f} s)"]
        if self._phase in ("generate", "score", "eval") and self._wanted:
            lines.append(self._bar_line())
        facts = [f"accuracy {self._accuracy_story()}"] if self._accuracies else []
        facts += [f"reward {self._reward:.3f}"] if self._reward is not None else []
        left = self._pace.left_s()
        facts += [f"about {duration(left)} left" if left is not None else "time left: known after the first step"]
        return Text("\n".join([*lines, "  ".join(facts)]))

    def _bar_line(self) -> str:
        full = round(BAR_WIDTH * min(1.0, self._admitted / self._wanted))
        bar = "█" * full + "░" * (BAR_WIDTH - full)
        if self._phase == "eval":
            return f"{bar} {self._admitted}/{self._wanted} responses"
        engine = f"{self._running} samples running, {self._open} groups open"
        return f"{bar} {self._admitted}/{self._wanted} groups  {engine}"

    def _accuracy_story(self) -> str:
        first, last = self._accuracies[0], self._accuracies[-1]
        words = f"{percent(last[0])} ({interval(*last[1:])})"
        return words if len(self._accuracies) == 1 else f"{percent(first[0])} at first, now {words}"


class Pace:
    """How long the rest takes: the median of recent steps, and of evaluations, times how many are left.

    Medians, because the first step warms up and a rare slow one says nothing about the next. An evaluation may fall
    within a step or between two: the time of its phase is subtracted from the step's.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._steps: list[float] = []
        self._evals: list[float] = []
        self._steps_left = self._evals_left = 0
        self._mark = clock()  # when the current step began
        self._eval_started: float | None = None

    def start(self, steps: int, evals: int) -> None:
        self._steps_left, self._evals_left, self._mark = steps, evals, self._clock()

    def phase(self, name: str) -> None:
        self._end_evaluation()
        if name == "eval":
            self._eval_started = self._clock()

    def step_done(self) -> None:
        self._end_evaluation()
        now = self._clock()
        self._steps.append(now - self._mark)
        self._mark = now
        self._steps_left = max(0, self._steps_left - 1)

    def left_s(self) -> float | None:
        """Seconds left, minus what the current step or evaluation has already taken; None before the first step."""
        if not self._steps:
            return None
        evals = median(self._evals) * self._evals_left if self._evals else 0.0
        total = median(self._steps[-RECENT_STEPS:]) * self._steps_left + evals
        return max(0.0, total - (self._clock() - self._mark))

    def _end_evaluation(self) -> None:
        if self._eval_started is None:
            return
        took = self._clock() - self._eval_started
        self._eval_started = None
        self._evals.append(took)
        self._evals_left = max(0, self._evals_left - 1)
        self._mark += took


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _describe(accuracy: Interval) -> str:
    return f"{percent(accuracy.mean)} ({interval(accuracy.low, accuracy.high)})"

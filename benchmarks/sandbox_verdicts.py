"""Verdicts per second of the sandbox on function-call tests and on stdin/stdout programs, after warm-up.

    .venv/bin/python benchmarks/sandbox_verdicts.py [--tasks HumanEval.jsonl.gz] [--workers 2] [--repeats 5]

Target: at least 60 HumanEval-sized verdicts per second on 2 cores. A verdict on functions is two processes in two
sandboxes (the program and its tests), on a script it is one. Each worker is a thread with a sandbox of its own, which
is what a reward worker has. Without ``--tasks``: the six tasks of tests/fixtures/humaneval_tiny.jsonl.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlpost.sandbox.box import FunctionTests, Sandbox
from rlpost.sandbox.limits import Limits

TINY = Path(__file__).parents[1] / "tests/fixtures/humaneval_tiny.jsonl"
LIMITS = Limits()
Judge = Callable[[Sandbox], str]  # one verdict: its outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=Path, default=TINY, help="JSONL in HumanEval's columns, .gz or not")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each repeat")
    args = parser.parse_args()

    functions = [make_function_judge(task) for task in read_tasks(args.tasks)]
    scripts: list[Judge] = [lambda box: box.run_script("print(int(input()) * 2)", b"21\n", LIMITS).kind]
    for workers in sorted({1, args.workers}):
        boxes = [Sandbox() for _ in range(workers)]
        for name, judges in ((f"functions ({len(functions)} tasks)", functions), ("scripts", scripts)):
            measure(boxes, judges, min(args.seconds, 1.0))  # warm-up
            rates = [measure(boxes, judges, args.seconds) for _ in range(args.repeats)]
            print(
                f"{name}, {workers} worker(s): median {statistics.median(rates):.0f} verdicts/s "
                f"({min(rates):.0f} to {max(rates):.0f}, {args.repeats} repeats of {args.seconds:g} s)",
                flush=True,
            )
        for box in boxes:
            box.close()


def read_tasks(path: Path) -> list[dict[str, str]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines()]


def make_function_judge(task: dict[str, str]) -> Judge:
    tests = FunctionTests(tests=[task["test"]], entry_points=[task["entry_point"]], helpers=task["prompt"])
    source = task["prompt"] + task["canonical_solution"]
    return lambda box: box.run_functions(source, tests, LIMITS).kind


def measure(boxes: list[Sandbox], judges: list[Judge], seconds: float) -> float:
    """Verdicts per second of all boxes together; every one must be ``passed``."""

    def work(box: Sandbox) -> int:
        count = 0
        while time.monotonic() < end:
            kind = judges[count % len(judges)](box)
            assert kind == "passed", kind
            count += 1
        return count

    for box in boxes:
        box.start()
    started = time.monotonic()
    end = started + seconds
    with ThreadPoolExecutor(len(boxes)) as pool:
        total = sum(pool.map(work, boxes))
    return total / (time.monotonic() - started)


if __name__ == "__main__":
    main()

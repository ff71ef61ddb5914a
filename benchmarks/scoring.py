"""Verdicts per second of the scorer: a trivial function in the process and through workers, and the math reward.

    .venv/bin/python benchmarks/scoring.py [--verdicts 5000] [--math 2000] [--repeats 5] [--workers 2]

Everything a verdict costs the run is in it: decoding (characters here), the way to a worker and back, JSON both ways.
The cache is off. One set of workers for all repeats, the first one warms up; medians and spread.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from rlpost.config import RewardConfig
from rlpost.rewards.functions import load_functions
from rlpost.rewards.scoring import RewardScorer
from rlpost.rewards.worker_pool import Calls, InlineCalls, RewardWorkers
from rlpost.types import Prompt

# (reference, answer): plain numbers as in GSM8K, and what needs math-verify. Each answer is made different by its work.
PLAIN = [("18", "18"), ("1,234", "1234"), ("7", "8"), ("0.5", "0.50")]
FORMULAS = [
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("(1,2]", "[1,2]"),
    (r"\{1,2\}", "1, 2"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verdicts", type=int, default=5000, help="of the trivial function, per repeat")
    parser.add_argument("--math", type=int, default=2000, help="of the math reward, per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    pairs = [("3", "3+5=8 8-2=6#6" + " and so on" * 20)]
    measure("exact_answer", 0, pairs, args.verdicts, args.repeats)
    measure("exact_answer", args.workers, pairs, args.verdicts, args.repeats)
    for name, answers in (("math, plain numbers", PLAIN), ("math, formulas", FORMULAS)):
        boxed = [(gold, f"so \\boxed{{{given}}}") for gold, given in answers]
        measure("math", args.workers, boxed, args.math, args.repeats, label=name)


def measure(
    function: str, workers: int, pairs: list[tuple[str, str]], count: int, repeats: int, label: str = ""
) -> None:
    cfg = RewardConfig(function=function, workers=workers)
    calls: Calls = RewardWorkers(cfg) if workers else InlineCalls(load_functions(cfg))
    try:
        calls.wait_ready()
        scorer = RewardScorer(calls, lambda parts: "".join(map(chr, parts[0])))
        rates = [run(scorer, pairs, count) for _ in range(repeats + 1)][1:]
    finally:
        calls.close()
    where = f"{workers} workers" if workers else "in the process"
    print(
        f"{label or function}, {where}: median {statistics.median(rates):,.0f} verdicts/s "
        f"({min(rates):,.0f} to {max(rates):,.0f}, {repeats} repeats of {count:,})",
        flush=True,
    )


def run(scorer: RewardScorer, pairs: list[tuple[str, str]], count: int) -> float:
    started = time.perf_counter()
    for index in range(count):
        reference, response = pairs[index % len(pairs)]
        prompt = Prompt(uid="0:0", token_ids=np.zeros(1, np.int32), text="?", reference=reference)
        scorer.submit(prompt, index, [np.array([ord(c) for c in response], np.int32)], "stop")
    assert scorer.drain(600)
    verdicts = scorer.poll()
    assert len(verdicts) == count and all(v.failure is None for v in verdicts)
    return count / (time.perf_counter() - started)


if __name__ == "__main__":
    main()

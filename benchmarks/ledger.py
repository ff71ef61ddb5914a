"""The rollout buffer and its ledger with very many open samples: resident memory, and a step's cost as the run goes on.

    .venv/bin/python benchmarks/ledger.py [--groups 12500] [--tokens 8000] [--steps 100] [--folder DIR]

Fills a buffer with 12,500 groups of 8 samples of 8,000 tokens (6.4 GB on disk), then runs steps of ``collect`` on the
simulated engine: 256 samples go on and finish, 32 groups are trained; before the next step 32 new ones of the same size
take their place, untimed. Targets: at most 1 GiB resident; the last ten steps cost at most 1.2 times the first ten
(medians; everything but the engine, disk included). Then a checkpoint's copy of the ledger, and a resume from it. Needs
15 GB of disk in ``--folder``.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rlpost.engine.protocol import SamplingSettings
from rlpost.rewards.scoring import InlineScorer
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect
from rlpost.rollout.ledger import Ledger
from rlpost.rollout.ledger_recovery import recover_ledger
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation.engine import SimulatedEngine, StepCost
from rlpost.types import Prompt

N, G, SLOTS = 32, 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=12_500)
    parser.add_argument("--tokens", type=int, default=8_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run(Path(folder), arguments.groups, arguments.tokens, arguments.steps)


def run(folder: Path, num_groups: int, num_tokens: int, steps: int) -> None:
    ledger = Ledger(folder / "ledger.sqlite")
    strategy = RolloutStrategy(
        groups_per_step=N,
        samples_per_group=G,
        oversample=num_groups / N + 1,
        max_staleness=num_groups // N + steps,
    )
    buffer = RolloutBuffer(strategy, ledger=ledger)
    stream = prompts()
    started = time.perf_counter()
    fill(buffer, stream, num_groups, num_tokens, step=0)
    size, seconds = ledger.path.stat().st_size / 1e9, time.perf_counter() - started
    print(f"{num_groups * G:,} open samples of {num_tokens:,} tokens: {size:.2f} GB in {seconds:.0f} s")
    print(f"  {1e9 * size / (num_groups * G):,.0f} bytes a sample, {memory()}")
    costs = take_steps(buffer, stream, num_tokens, steps)
    first, last = statistics.median(costs[:10]), statistics.median(costs[-10:])
    print(
        f"step, engine left out: first ten {1e3 * first:.0f} ms, last ten {1e3 * last:.0f} ms, ratio {last / first:.2f}"
    )
    print(f"  all: median {1e3 * statistics.median(costs):.0f} ms, {1e3 * min(costs):.0f} to {1e3 * max(costs):.0f}")
    print(f"  {memory()}")
    copy_and_resume(folder, ledger, buffer, steps)


def fill(buffer: RolloutBuffer, stream: Iterator[Prompt], num_groups: int, num_tokens: int, *, step: int) -> None:
    """Every sample paused after ``num_tokens`` tokens, stored a few hundred groups at a time."""
    token_ids = np.arange(num_tokens, dtype=np.int32)
    logprobs = np.linspace(-1, 0, num_tokens, dtype=np.float32)
    buffer.begin_step(step)
    buffer.schedule._startable.clear()  # only the groups still to come
    for number in range(num_groups):
        buffer.add(next(stream))
        for group, sample in buffer.next_samples(G):
            buffer.receive(group, sample, token_ids, logprobs)
            buffer.pause(group, sample, startable=False)
        buffer.schedule._startable.clear()
        if number % 200 == 199:
            buffer.store()
    buffer.store()


def take_steps(buffer: RolloutBuffer, stream: Iterator[Prompt], num_tokens: int, steps: int) -> list[float]:
    """Seconds of each step outside the engine."""
    limit = num_tokens + 64
    engine = SimulatedEngine(
        max_slots=SLOTS,
        length_of=lambda request_id: num_tokens + 8,
        max_response_tokens=limit,
        cost=StepCost(base_s=1.0, sample_s=0.0, prefill_s=0.0),
    )
    settings = CollectSettings(
        max_in_flight=SLOTS,
        max_response_tokens=limit,
        sampling=SamplingSettings(),
        seed=0,
        max_filtered_groups=1000,
        reject=lambda group: None,
    )
    scorer = InlineScorer(lambda response, **_: 1.0, decode=lambda parts: "")
    costs = []
    for step in range(1, steps + 1):
        started = time.perf_counter()
        collect(engine, buffer, stream, scorer, settings, step=step)
        buffer.rollout()
        buffer.store()
        buffer.settle()
        buffer.check_conservation()
        costs.append(time.perf_counter() - started)
        fill(buffer, stream, N, num_tokens, step=step)
    return costs


def copy_and_resume(folder: Path, ledger: Ledger, buffer: RolloutBuffer, step: int) -> None:
    step += 1  # steps are counted from 1 in the ledger
    started = time.perf_counter()
    buffer.check_ledger()
    print(f"check of memory against ledger: {time.perf_counter() - started:.2f} s")
    started = time.perf_counter()
    ledger.snapshot(folder / "copy.sqlite", step=step)
    size = (folder / "copy.sqlite").stat().st_size / 1e9
    print(f"checkpoint's copy: {size:.2f} GB in {time.perf_counter() - started:.0f} s")
    ledger.close()
    started = time.perf_counter()
    recovery = recover_ledger(folder / "ledger.sqlite", folder / "copy.sqlite", step=step)
    groups = recovery.ledger.read_open()
    print(
        f"resume, every token verified: {len(groups):,} groups in {time.perf_counter() - started:.0f} s{recovery.note}"
    )
    print(f"  {memory()}")


def prompts() -> Iterator[Prompt]:
    token_ids = np.arange(100, dtype=np.int32)
    return (Prompt(uid=f"0:{n}", token_ids=token_ids, text="a question " * 30) for n in itertools.count())


def memory() -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"peak resident memory {peak:,.0f} MiB"


if __name__ == "__main__":
    main()

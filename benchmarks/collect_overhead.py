"""Our own code inside ``collect`` as a share of the engine's step time, at 64 samples in flight on the demo's model.

    .venv/bin/python benchmarks/collect_overhead.py [--steps 12] [--repeats 5]

Own time is an iteration's wall time minus what ``engine.step()`` reports (buffer, scheduling, scoring by
``exact_answer``, decoding of responses, admission), plus ``read_deltas`` inside that step, which is ours as well, minus
vLLM's ``add_request``, which is not. Targets: at most 0.08, and at most 5 microseconds for what every token costs:
reading vLLM's outputs and ``receive``. The rest is the cost of a sample. One engine, repeats in one process; medians
and spread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from rlpost.config.compose import load_config
from rlpost.prompts.cursor import draw_prompts, open_cursor
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, _Collector, collect
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.session import open_session


class Clock:
    """Seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.spent[name] += time.perf_counter() - started

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="rollout steps per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    cfg = load_config(["recipe=math/arithmetic", "engine.max_slots=64"])
    session = open_session(cfg)
    from rlpost.engine import vllm

    clock = Clock()
    vllm.read_deltas = clock.timed("read", vllm.read_deltas)  # type: ignore[assignment]
    _Collector.receive = clock.timed("receive", _Collector.receive)  # type: ignore[method-assign]
    _Collector.end_turn = clock.timed("end_turn", _Collector.end_turn)  # type: ignore[method-assign]
    engine = vllm.build_engine(session.cfg, model_folder=session.model_folder, max_model_len=session.max_model_len)
    engine._engine.add_request = clock.timed("add_request", engine._engine.add_request)
    settings = CollectSettings(
        max_in_flight=64,
        max_response_tokens=cfg.rollout.max_response_tokens,
        sampling=session.sampling,
        seed=0,
        max_filtered_groups=512,
        reject=lambda group: None,
    )
    prompts = draw_prompts(open_cursor(session.train_sets, seed=0, shuffle=True), session.train_sets)
    strategy = RolloutStrategy(groups_per_step=32, samples_per_group=8, oversample=2.0, max_staleness=4)
    shares, costs, samples = [], [], []
    for repeat in range(args.repeats + 1):  # the first one warms up
        buffer = RolloutBuffer(strategy)
        own_s = engine_s = 0.0
        num_steps = num_tokens = 0
        num_samples = 0
        clock.spent.clear()
        for step in range(args.steps):
            stats = collect(engine, buffer, prompts, session.scorer, settings, step=step)
            buffer.settle()
            own_s += stats.work.own_s
            engine_s += stats.work.wall_s - stats.work.own_s
            num_steps += len(stats.work.step_s)
            num_tokens += stats.num_generated
            num_samples += len(stats.spans.start_s)
        spent = clock.spent
        moved = spent["read"] - spent["add_request"]
        own_s, engine_s = own_s + moved, engine_s - moved
        if repeat:
            of_tokens = spent["read"] + spent["receive"] - spent["end_turn"]
            shares.append(own_s / engine_s)
            costs.append(1e6 * of_tokens / num_tokens)
            samples.append(1e6 * (own_s - of_tokens) / num_samples)
            print(
                f"repeat {repeat}: own {1e3 * own_s / num_steps:.2f} ms, engine {1e3 * engine_s / num_steps:.2f} ms "
                f"a step, ratio {shares[-1]:.3f}; {costs[-1]:.1f} us a token, {samples[-1]:.0f} us a sample"
            )
    engine.shutdown()
    session.close()
    print(
        f"own time / engine time: median {statistics.median(shares):.3f} "
        f"({min(shares):.3f} to {max(shares):.3f}, {len(shares)} repeats, target <= 0.08); "
        f"{statistics.median(costs):.1f} us a token ({min(costs):.1f} to {max(costs):.1f}, target <= 5); "
        f"{statistics.median(samples):.0f} us a sample"
    )


if __name__ == "__main__":
    main()

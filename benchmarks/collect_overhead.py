"""Our own code inside ``collect`` as a share of the engine's step time, at 64 samples in flight on the demo's model.

    .venv/bin/python benchmarks/collect_overhead.py [--steps 12] [--repeats 5]

Targets: at most 0.08, and 5 microseconds a token for ``collect`` and the reading of vLLM's outputs together. Own time
is an iteration's wall time minus what ``engine.step()`` reports (buffer, scheduling, scoring by ``exact_answer``,
decoding of responses, admission), plus the time of ``read_deltas`` inside that step, which is ours as well. One engine,
repeats in one process; medians and spread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from rlpost.config.compose import load_config
from rlpost.prompts.cursor import draw_prompts, open_cursor
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.session import open_session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="rollout steps per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    cfg = load_config(["recipe=math/arithmetic", "engine.max_slots=64"])
    session = open_session(cfg)
    from rlpost.engine import vllm

    read_deltas, read_s = vllm.read_deltas, 0.0

    def read_timed(outputs: Any) -> Any:
        nonlocal read_s
        started = time.perf_counter()
        deltas = read_deltas(outputs)
        read_s += time.perf_counter() - started
        return deltas

    vllm.read_deltas = read_timed
    engine = vllm.build_engine(session.cfg, model_folder=session.model_folder, max_model_len=session.max_model_len)
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
    shares, costs = [], []
    for repeat in range(args.repeats + 1):  # the first one warms up
        buffer = RolloutBuffer(strategy)
        own_s = engine_s = 0.0
        num_steps = num_tokens = 0
        read_s = 0.0
        for step in range(args.steps):
            stats = collect(engine, buffer, prompts, session.scorer, settings, step=step)
            buffer.settle()
            own_s += stats.work.own_s
            engine_s += stats.work.wall_s - stats.work.own_s
            num_steps += len(stats.work.step_s)
            num_tokens += stats.num_generated
        own_s, engine_s = own_s + read_s, engine_s - read_s
        if repeat:
            shares.append(own_s / engine_s)
            costs.append(1e6 * own_s / num_tokens)
            print(
                f"repeat {repeat}: own {1e3 * own_s / num_steps:.2f} ms, engine {1e3 * engine_s / num_steps:.2f} ms "
                f"a step, ratio {shares[-1]:.3f}; {costs[-1]:.1f} us a token, {1e6 * read_s / num_tokens:.1f} reading"
            )
    engine.shutdown()
    session.close()
    print(
        f"own time / engine time: median {statistics.median(shares):.3f} "
        f"({min(shares):.3f} to {max(shares):.3f}, {len(shares)} repeats, target <= 0.08); median "
        f"{statistics.median(costs):.1f} us a token ({min(costs):.1f} to {max(costs):.1f}, target <= 5)"
    )


if __name__ == "__main__":
    main()

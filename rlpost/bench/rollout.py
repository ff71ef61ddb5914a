"""``rlpost bench rollout``: how close each strategy comes to the engine's saturated rate, in one run.

Runs saturated, synchronous, the published scheduler and ours over the same prompts, forced lengths, slots and cap, on
the simulated engine with a GPU's cost ratio and on the real one, alternating within each repeat; prints a table and
writes ``results.json`` and ``results.svg``. Called by ``cli``. Nothing is trained.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.bench.engines import ForcedLengths, gpu_cost, simulated_engine
from rlpost.bench.machine import describe_machine, find_revision, find_versions
from rlpost.bench.plot import write_plot
from rlpost.bench.published import run_published
from rlpost.bench.result import Result
from rlpost.config import Config
from rlpost.config.resolve import resolve
from rlpost.durable.run_record import RunRecord
from rlpost.engine.protocol import Engine, SamplingSettings
from rlpost.errors import ConfigError, explain
from rlpost.rollout.collect import CollectSettings
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation import strategies
from rlpost.simulation.account import Figures, StepAccount, measure
from rlpost.simulation.lengths import make_lengths
from rlpost.simulation.replay import fit_cost
from rlpost.simulation.strategies import ADAPTIVE, KEEPING, OURS, SATURATED, SYNCHRONOUS, Workload
from rlpost.types import Prompt
from rlpost.workers.runtime import choose_device

PUBLISHED, PUBLISHED_BY_GROUP = "published", "published, slots by group"
STRATEGIES = (SATURATED, SYNCHRONOUS, PUBLISHED, PUBLISHED_BY_GROUP, OURS, ADAPTIVE, KEEPING)
PUBLISHED_OVERSAMPLE = 2.0  # the paper's
PROMPT_TOKENS = 32  # of the simulated engine's prompts
SIMULATED, VLLM = "simulated", "vllm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured, and how often."""

    engines: Sequence[str] = (SIMULATED, VLLM)
    lengths: Sequence[str] = ("lognormal", "uniform", "bimodal")
    steps: int = 20  # measured
    warm_up: int = 3
    repeats: int = 3
    prefill_ratio: float = 50.0  # simulated engine: prefilled tokens in the time of one decoded token


def run(cfg: Config, plan: Plan, out: Path, say: Callable[[str], None] = print) -> list[Result]:
    """Raises ConfigError for a plan that cannot be carried out; creates the folder ``out`` if it is missing."""
    cfg = replace(cfg, engine=resolve(cfg, device=choose_device(cfg), threads=1).engine)
    _check(cfg, plan)
    results: list[Result] = []
    for name in plan.engines:
        with_engine = _on_vllm if name == VLLM else _on_simulated
        results += with_engine(cfg, plan, say)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(_as_json(cfg, plan, results), indent=1) + "\n")
    write_plot(out / "results.svg", results)
    say(table(results))
    say(f"{out / 'results.json'}, {out / 'results.svg'}")
    return results


def table(results: Sequence[Result]) -> str:
    """Medians, and the minimum and maximum of the repeats for the ratio to saturated."""
    header = f"{'engine':10} {'lengths':12} {'strategy':26} {'tokens/s':>9} {'of saturated':>22} {'idle':>6} "
    header += f"{'carried':>8} {'replayed':>9} {'its time':>9} {'span':>5} {'stale':>5} {'discarded':>9}"
    lines = [header]
    for r in results:
        ratio = f"{statistics.median(r.of_saturated):.3f} ({min(r.of_saturated):.3f}-{max(r.of_saturated):.3f})"
        lines.append(
            f"{r.engine:10} {r.lengths[:12]:12} {r.strategy:26} {_median(r, 'consumed_tokens_per_s'):9.0f} {ratio:>22} "
            f"{_median(r, 'idle_share'):6.3f} {_median(r, 'carried_share'):8.3f} {_median(r, 'replay_share'):9.3f} "
            f"{statistics.median(r.replay_time_share):9.3f} {_median(r, 'span_mean'):5.2f} "
            f"{_median(r, 'staleness_max'):5.0f} {_median(r, 'discarded_share'):9.3f}"
        )
    return "\n".join(lines)


def _on_simulated(cfg: Config, plan: Plan, say: Callable[[str], None]) -> list[Result]:
    slots, cap = cfg.max_in_flight, cfg.rollout.max_response_tokens
    cost = gpu_cost(slots, prefill_ratio=plan.prefill_ratio)

    def build(lengths: str, seed: int) -> Engine:
        length_of = make_lengths(lengths, cap=cap, seed=seed)
        return simulated_engine(slots=slots, cap=cap, length_of=length_of, cost=cost)

    token_ids = np.zeros(PROMPT_TOKENS, np.int32)

    def prompts() -> Iterator[Prompt]:
        return (Prompt(uid=str(n), token_ids=token_ids, text="") for n in itertools.count())

    load = _workload(cfg, SamplingSettings(), prompts, publish=lambda: None)
    return _run_all(cfg, plan, SIMULATED, build, load, say, prefill_s=cost.prefill_s)


def _on_vllm(cfg: Config, plan: Plan, say: Callable[[str], None]) -> list[Result]:
    """The model and prompts are the configuration's."""
    from rlpost.session import open_session

    session = open_session(cfg)
    try:
        from rlpost.engine.vllm import build_engine

        engine = build_engine(
            replace(session.cfg, rollout=replace(cfg.rollout, keep_kv=True)),  # one of the strategies keeps KV
            model_folder=session.model_folder,
            max_model_len=session.max_model_len,
        )
        try:
            weights = [[(name, engine.read_weight(name).clone())] for name in engine.weight_names]
            data, cap = session.some_prompts(1 << 20), cfg.rollout.max_response_tokens

            def prompts() -> Iterator[Prompt]:
                for n, prompt in enumerate(itertools.cycle(data)):
                    yield Prompt(uid=str(n), token_ids=prompt.token_ids, text=prompt.text)

            def build(lengths: str, seed: int) -> Engine:
                return ForcedLengths(engine, cap=cap, length_of=make_lengths(lengths, cap=cap, seed=seed))

            # A publication of the same weights: it empties the prefix cache, as after an update.
            load = _workload(cfg, session.sampling, prompts, publish=lambda: engine.load_weights(weights))
            return _run_all(cfg, plan, VLLM, build, load, say)
        finally:
            engine.shutdown()
    finally:
        session.close()


def _run_all(
    cfg: Config,
    plan: Plan,
    engine_name: str,
    build: Callable[[str, int], Engine],
    load: Workload,
    say: Callable[[str], None],
    prefill_s: float | None = None,
) -> list[Result]:
    """``prefill_s``: the cost of a prefilled token; None: fitted to all iterations of all strategies, since only
    together do they separate an iteration's cost from a slot's."""
    results = []
    for lengths in plan.lengths:
        figures: dict[str, list[Figures]] = {name: [] for name in STRATEGIES}
        accounts: dict[str, list[list[StepAccount]]] = {name: [] for name in STRATEGIES}
        for repeat in range(plan.repeats):
            for strategy in STRATEGIES:
                started = time.monotonic()
                engine = build(lengths, cfg.seed + repeat)
                steps = _run_one(strategy, engine, load, cfg, plan)
                warm_up = 1 if strategy == SATURATED else plan.warm_up
                accounts[strategy].append(steps[warm_up:])
                figures[strategy].append(measure(steps, warm_up=warm_up))
                say(
                    f"{engine_name}, {lengths}, repeat {repeat + 1}, {strategy}: "
                    f"{figures[strategy][-1].consumed_tokens_per_s:.0f} tokens/s "
                    f"({time.monotonic() - started:.0f} s)"
                )
        saturated = [f.consumed_tokens_per_s for f in figures[SATURATED]]
        token_s = prefill_s
        if token_s is None:
            token_s = _fitted_prefill_s([a for runs in accounts.values() for steps in runs for a in steps])
        for strategy in STRATEGIES:
            results.append(
                Result(
                    engine=engine_name,
                    lengths=lengths,
                    strategy=strategy,
                    figures=figures[strategy],
                    of_saturated=[
                        f.consumed_tokens_per_s / s for f, s in zip(figures[strategy], saturated, strict=True)
                    ],
                    replay_time_share=[_replay_time_share(f, token_s) for f in figures[strategy]],
                )
            )
    return results


def _run_one(strategy: str, engine: Engine, load: Workload, cfg: Config, plan: Plan) -> list[StepAccount]:
    num_steps, rollout = plan.warm_up + plan.steps, cfg.rollout
    if strategy == SATURATED:
        return strategies.run_saturated(engine, load, warm_up=plan.warm_up, num_steps=num_steps)
    if strategy in (PUBLISHED, PUBLISHED_BY_GROUP):
        hold = "sample" if strategy == PUBLISHED else "group"
        return list(run_published(engine, load, oversample=PUBLISHED_OVERSAMPLE, hold=hold, num_steps=num_steps))
    ours = RolloutStrategy.of(rollout)
    if strategy == SYNCHRONOUS:
        ours = RolloutStrategy(groups_per_step=rollout.groups_per_step, samples_per_group=rollout.samples_per_group)
    else:
        ours = replace(ours, adaptive=strategy == ADAPTIVE)
    accounts = strategies.run_collect(
        engine, load, ours, num_steps=num_steps, slots=cfg.max_in_flight, keep_kv=strategy == KEEPING
    )
    return list(accounts)


def _workload(
    cfg: Config, sampling: SamplingSettings, prompts: Callable[[], Iterator[Prompt]], publish: Callable[[], None]
) -> Workload:
    settings = CollectSettings(
        max_in_flight=cfg.max_in_flight,
        max_response_tokens=cfg.rollout.max_response_tokens,
        sampling=sampling,
        seed=cfg.seed,
        max_filtered_groups=1,
        reject=lambda group: None,
    )
    return Workload(
        groups_per_step=cfg.rollout.groups_per_step,
        samples_per_group=cfg.rollout.samples_per_group,
        settings=settings,
        prompts=prompts,
        publish=publish,
    )


def _fitted_prefill_s(steps: Sequence[StepAccount]) -> float:
    record = RunRecord()
    for account in steps:
        record.observe(account.work)
    return float(fit_cost(record).prefill_s)


def _replay_time_share(figures: Figures, prefill_s: float) -> float:
    replay_s = prefill_s * figures.replayed_tokens
    return replay_s / max(1e-9, figures.duration_s - replay_s)


def _median(result: Result, name: str) -> float:
    return statistics.median(getattr(f, name) for f in result.figures)


def _check(cfg: Config, plan: Plan) -> None:
    for name in plan.engines:
        if name not in (SIMULATED, VLLM):
            raise ConfigError(explain("--engines", name, f"{SIMULATED}, {VLLM}", "name one or both"))
    for option, value, least in (("--steps", plan.steps, 1), ("--warm-up", plan.warm_up, 1)):
        if value < least:
            raise ConfigError(explain(option, value, f">= {least}", "raise it"))
    if cfg.cluster.num_workers > 1:
        do = "the benchmark runs on one engine, in this process"
        raise ConfigError(explain("cluster.num_workers", cfg.cluster.num_workers, "1", do))
    if cfg.rollout.on_stale == "restart":
        do = "remove it: the benchmark discards nothing"
        raise ConfigError(explain("rollout.on_stale", "restart", "schedule", do))
    if plan.repeats < 1 or plan.prefill_ratio <= 0:
        raise ConfigError("--repeats must be >= 1 and --prefill-ratio > 0")
    if cfg.max_in_flight < cfg.rollout.samples_per_group:
        do = "raise engine.max_slots: the published scheduler needs room for a group"
        raise ConfigError(explain("slots", cfg.max_in_flight, f">= {cfg.rollout.samples_per_group}", do))
    for lengths in plan.lengths:
        make_lengths(lengths, cap=cfg.rollout.max_response_tokens, seed=0)


def _as_json(cfg: Config, plan: Plan, results: Sequence[Result]) -> dict[str, Any]:
    rollout = cfg.rollout
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),  # when it ended
        "machine": describe_machine(),
        "revision": find_revision(),
        "versions": find_versions(),
        "plan": asdict(plan),
        "seed": cfg.seed,
        "slots": cfg.max_in_flight,
        "groups_per_step": rollout.groups_per_step,
        "samples_per_group": rollout.samples_per_group,
        "max_response_tokens": rollout.max_response_tokens,
        "oversample": rollout.oversample,
        "admission": rollout.admission,
        "max_staleness": rollout.max_staleness,
        "results": [asdict(result) for result in results],
    }

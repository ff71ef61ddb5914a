"""``rlpost plan``: what a step of a configuration will take, for each oversample ratio, and which ratio is best.

Prices simulated rollouts with the costs of a recorded run (or given ones). The recorded run itself is replayed first:
the time its rollouts took beyond the replay is added to every prediction, so the run's own configuration is predicted
as it was. Called by ``cli``; ``plan.show`` prints the result. Starts nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from rlpost.config import Config
from rlpost.config.resolve import choose_slots
from rlpost.durable.run_record import RunRecord
from rlpost.plan.costs import Costs, fit_costs
from rlpost.plan.extrapolation import find_extrapolated
from rlpost.plan.recording import RecordedGroup, RecordedStep, Recording, read_recording
from rlpost.plan.request import Request, check_request, choose_ratios
from rlpost.plan.simulate import Lengths, shuffled, simulate
from rlpost.simulation.account import StepAccount, measure
from rlpost.simulation.lengths import make_lengths
from rlpost.simulation.replay import fit_cost
from rlpost.workers.runtime import wanted_device

T = TypeVar("T")

GOOD_ENOUGH = 0.99  # of the most tokens/s: a smaller ratio that reaches it trains younger tokens and is preferred
ADAPTIVE = "adaptive"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One ratio's prediction: means over simulated steps; seconds and shares. ``*_error``: one standard deviation over
    the repeats."""

    oversample: float | str
    step_s: float
    generate_s: float
    update_s: float
    publish_s: float
    other_s: float
    idle_share: float
    carried_share: float
    trained_tokens_per_s: float
    step_s_error: float = 0.0
    trained_tokens_per_s_error: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """The recorded run versus its own replay: generation seconds per step, means over the counted steps, and the median
    duration of a step."""

    steps: int
    measured_generate_s: float
    simulated_generate_s: float
    measured_step_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    configured: float | str  # the configuration's own ratio
    rows: list[Row]
    best: float | str
    reason: str
    costs: Costs
    check: Check | None  # None without a recorded run
    extrapolated: list[str]  # what the recorded run cannot tell, in words


@dataclass(frozen=True, kw_only=True, slots=True)
class Priced:
    """Costs, and the simulator's error in idle slots."""

    costs: Costs
    idle_shift: float = 0.0  # added to a simulated idle share
    kv_slots: int | None = None  # maximum samples in flight; None: no limit besides the slots


def make_plan(cfg: Config, request: Request) -> Plan:
    """Raises ConfigError for an incomplete request, RunError for an unusable recording."""
    check_request(cfg, request)
    ratios: list[float | str] = list(choose_ratios(cfg, request))
    if cfg.rollout.adaptive_oversample:
        ratios.append(ADAPTIVE)
    if request.recording is None:
        recording, check, notes = None, None, []
        cfg = _with_slots(cfg, choose_slots(cfg, wanted_device(cfg)))
        priced = Priced(costs=Costs(**{"rollout_s": 0.0, "reduce_s": 0.0} | request.costs))
    else:
        recording = read_recording(request.recording, warm_up=request.warm_up)
        cfg = _with_slots(cfg, recording.cfg.engine.max_slots)
        priced, check = _calibrate(cfg, recording, recording.steps, request)
        notes = find_extrapolated(cfg, recording, priced.costs, given=request.costs, lengths=request.lengths)
    rows = _predict_all(cfg, request, priced, _lengths(cfg, request, recording, cfg.seed), ratios)
    repeats = []
    rng = np.random.default_rng(cfg.seed)
    for repeat in range(request.repeats):
        again, groups = priced, None
        if recording is not None:
            again, _ = _calibrate(cfg, recording, _drawn_from(recording.steps, rng), request)
            groups = _drawn_from(recording.typical_groups, rng)
        lengths = _lengths(cfg, request, recording, cfg.seed + 1 + repeat, groups)
        repeats.append(_predict_all(cfg, request, again, lengths, ratios))
    rows = [_with_errors(row, [repeat[n] for repeat in repeats]) for n, row in enumerate(rows)]
    best, reason = _choose(rows, repeats)
    return Plan(
        configured=ADAPTIVE if cfg.rollout.adaptive_oversample else cfg.rollout.oversample,
        rows=rows,
        best=best,
        reason=reason,
        costs=priced.costs,
        check=check,
        extrapolated=notes,
    )


def _with_slots(cfg: Config, slots: int | None) -> Config:
    """``cfg`` with the slots of each engine written out, ``slots`` unless it says how many."""
    return replace(cfg, engine=replace(cfg.engine, max_slots=cfg.engine.max_slots or slots))


# ---- from a recorded run ---------------------------------------------------------------------------------------------


def _calibrate(
    cfg: Config, recording: Recording, steps: Sequence[RecordedStep], request: Request
) -> tuple[Priced, Check]:
    """Costs from ``steps`` (the recording's, or drawn from them with replacement), overridden by given ones, and the
    recorded run compared with its own replay."""
    record = RunRecord()
    for sums in [*recording.evaluations, *(sums for step in steps for sums in step.iterations)]:
        record.add_sums(sums)
    engine = fit_cost(record)
    engine = replace(engine, prefill_s=engine.prefill_s * recording.prefill_share)
    accounts = simulate(
        recording.cfg,
        engine,
        shuffled(recording.typical_groups, seed=0, first=recording.groups),
        prompt_tokens=recording.prompt_tokens,
        num_steps=recording.num_replayed,
        kv_slots=recording.kv_slots,
    )
    replayed = [accounts[step.step - recording.first_step] for step in steps]
    costs = fit_costs(
        steps,
        engine,
        rollout_s=statistics.median(s.generate_s - r.duration_s for s, r in zip(steps, replayed, strict=True)),
        prompt_tokens=recording.prompt_tokens,
        ranks=recording.cfg.cluster.num_workers,
    )
    check = Check(
        steps=len(steps),
        measured_generate_s=statistics.fmean(step.generate_s for step in steps),
        simulated_generate_s=statistics.fmean(account.duration_s for account in replayed),
        measured_step_s=statistics.median(step.step_s for step in steps),
    )
    idle = [s.idle_share - _idle_share(r) for s, r in zip(steps, replayed, strict=True)]
    return Priced(
        costs=replace(costs, **request.costs),
        idle_shift=statistics.median(idle),
        kv_slots=recording.kv_slots if cfg.num_engines == 1 else None,
    ), check


def _lengths(
    cfg: Config,
    request: Request,
    recording: Recording | None,
    seed: int,
    groups: Sequence[RecordedGroup] | None = None,
) -> Lengths:
    """``groups``: used instead of the recording's."""
    if request.lengths is not None:
        return Lengths(length_of=make_lengths(request.lengths, cap=cfg.rollout.max_response_tokens, seed=seed))
    assert recording is not None, "check_request requires one of the two"
    return shuffled(groups or recording.typical_groups, seed=seed)


def _drawn_from(values: Sequence[T], rng: np.random.Generator) -> list[T]:
    """The same number of values, drawn with replacement."""
    return [values[n] for n in rng.integers(0, len(values), len(values))]


# ---- one ratio -------------------------------------------------------------------------------------------------------


def _predict_all(
    cfg: Config, request: Request, priced: Priced, lengths: Lengths, ratios: Sequence[float | str]
) -> list[Row]:
    rows: list[Row] = []
    for ratio in ratios:
        if ratio != ADAPTIVE and len(rows) > 1 and replace(rows[-2], oversample=rows[-1].oversample) == rows[-1]:
            rows.append(
                replace(rows[-1], oversample=ratio)
            )  # the slots cannot use more: a higher limit changes nothing
        else:
            rows.append(_predict(cfg, request, priced, lengths, ratio))
    return rows


def _predict(cfg: Config, request: Request, priced: Priced, lengths: Lengths, ratio: float | str) -> Row:
    costs = priced.costs
    warm_up = cfg.rollout.max_staleness + 2  # until the carried-over tokens are stationary
    accounts = simulate(
        cfg,
        costs.engine(),
        lengths,
        prompt_tokens=costs.prompt_tokens,
        num_steps=warm_up + request.steps,
        oversample=None if isinstance(ratio, str) else ratio,
        kv_slots=priced.kv_slots,
    )
    window, figures = accounts[warm_up:], measure(accounts, warm_up=warm_up)
    generate_s = max(0.0, figures.duration_s / len(window) + costs.rollout_s)
    update_s = statistics.fmean(_update_s(cfg, costs, account) for account in window)
    step_s = generate_s + update_s + costs.publish_s + costs.other_s
    return Row(
        oversample=ratio,
        step_s=step_s,
        generate_s=generate_s,
        update_s=update_s,
        publish_s=costs.publish_s,
        other_s=costs.other_s,
        idle_share=min(1.0, max(0.0, statistics.fmean(map(_idle_share, window)) + priced.idle_shift)),
        carried_share=figures.carried_share,
        trained_tokens_per_s=sum(a.trained for a in window) / len(window) / step_s,
    )


def _idle_share(account: StepAccount) -> float:
    """0 for a step that found all its groups complete and generated nothing."""
    return 1 - account.busy_slot_s / account.offered_slot_s if account.offered_slot_s else 0.0


def _update_s(cfg: Config, costs: Costs, account: StepAccount) -> float:
    rollout = cfg.rollout
    prompts = costs.prompt_tokens * rollout.groups_per_step * rollout.samples_per_group
    return costs.update(account.trained + prompts, ranks=cfg.cluster.num_workers)


def _with_errors(row: Row, repeats: Sequence[Row]) -> Row:
    def deviation(name: str) -> float:
        return statistics.stdev(getattr(r, name) for r in repeats) if len(repeats) > 1 else 0.0

    return replace(
        row,
        step_s_error=deviation("step_s"),
        trained_tokens_per_s_error=deviation("trained_tokens_per_s"),
    )


def _choose(rows: Sequence[Row], repeats: Sequence[Sequence[Row]]) -> tuple[float | str, str]:
    """The smallest ratio that is as good as the fastest, and why."""
    best, fastest = _find_best(rows), _fastest(rows)
    agree = sum(_find_best(repeat).oversample == best.oversample for repeat in repeats)
    reason = (
        f"{best.trained_tokens_per_s:,.0f} trained tokens/s with {best.idle_share:.0%} of the slots idle "
        f"(best in {agree} of {len(repeats)} repeats)"
    )
    if best is not fastest:
        reason += (
            f"; {fastest.oversample} is {fastest.trained_tokens_per_s / best.trained_tokens_per_s - 1:.1%} faster, but "
            f"carries over {fastest.carried_share:.0%} of its tokens instead of {best.carried_share:.0%}"
        )
    first = rows[0]
    if best is not first and first.oversample == 1.0:
        gain = best.trained_tokens_per_s / first.trained_tokens_per_s - 1
        reason += f"; {gain:.0%} more than synchronous, whose slots are idle for {first.idle_share:.0%}"
    return best.oversample, reason


def _fastest(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row.trained_tokens_per_s)


def _find_best(rows: Sequence[Row]) -> Row:
    enough = GOOD_ENOUGH * _fastest(rows).trained_tokens_per_s
    return next(row for row in rows if row.trained_tokens_per_s >= enough)

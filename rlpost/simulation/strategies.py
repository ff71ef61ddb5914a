"""The strategies that are ``rollout.collect`` with other numbers: ours, synchronous, and the saturated engine.

*Saturated* is the same request path with endless new prompts, without stops and aborts, so that all slots are always
full: one step that never ends, cut into windows. Nothing is trained, only counted; ``publish`` takes the place of an
update, so that the engine's prefix cache does not outlive a step. Called by ``bench.rollout``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rlpost.engine.protocol import Engine, Iterations
from rlpost.rewards.scoring import InlineScorer, Scorer
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectProgress, CollectSettings, collect
from rlpost.rollout.stats import RolloutStats
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.simulation.account import StepAccount
from rlpost.types import Group, Prompt

SYNCHRONOUS, SATURATED, OURS, ADAPTIVE = "synchronous", "saturated", "ours", "ours, adaptive"
KEEPING = "ours, keep_kv"


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What all strategies share."""

    groups_per_step: int
    samples_per_group: int
    settings: CollectSettings  # including slots, cap, sampling and seed
    prompts: Callable[[], Iterator[Prompt]]  # the same endless prompts at each call
    publish: Callable[[], None]  # between two steps


def run_collect(
    engine: Engine,
    load: Workload,
    strategy: RolloutStrategy,
    *,
    num_steps: int,
    slots: int | None = None,
    keep_kv: bool = False,
) -> Iterator[StepAccount]:
    """Ours. ``slots``: the number an adaptive strategy assumes; None: all in flight."""
    settings = replace(load.settings, keep_kv=keep_kv)
    buffer = RolloutBuffer(strategy, slots=load.settings.max_in_flight if slots is None else slots)
    prompts, scorer = load.prompts(), no_scores()
    for step in range(num_steps):
        load.publish()
        stats = collect(engine, buffer, prompts, scorer, settings, step=step)
        groups = buffer.rollout()
        buffer.settle()
        buffer.check_conservation()
        held = sum(g.num_tokens for g in buffer.groups.values())
        yield account_of(stats, groups, held=held)
    engine.abort_all()  # the next strategy must not see what it kept


def run_saturated(engine: Engine, load: Workload, *, warm_up: int, num_steps: int) -> list[StepAccount]:
    """Two accounts: of the time until as many groups were complete as ``warm_up`` steps train, and of the time in which
    those of the other steps were completed."""
    first, total = warm_up * load.groups_per_step, num_steps * load.groups_per_step
    # Never short of prompts: more groups may be open than there are slots for samples.
    spare = 4 * load.settings.max_in_flight + total
    strategy = RolloutStrategy(
        groups_per_step=total + 1,  # one more than awaited: the step is never complete
        samples_per_group=load.samples_per_group,
        oversample=(total + 1 + spare) / (total + 1),
        max_staleness=1 + spare // total,
    )
    buffer = RolloutBuffer(strategy)
    marks: list[tuple[float, int, int]] = []  # (seconds, tokens generated, engine steps) when a part was complete
    started_s, num_steps_done = engine.now(), 0

    def watch(progress: CollectProgress) -> None:
        nonlocal num_steps_done
        num_steps_done += 1
        if len(marks) < 2 and progress.admitted >= (first, total)[len(marks)]:
            marks.append((engine.now() - started_s, buffer.accounts.tokens_received, num_steps_done))

    load.publish()
    stats = collect(
        engine,
        buffer,
        load.prompts(),
        no_scores(),
        load.settings,
        step=0,
        on_progress=watch,
        should_stop=lambda: len(marks) == 2,
    )
    accounts, (before_s, before_tokens, before_steps) = [], (0.0, 0, 0)
    for seconds, tokens, steps in marks:
        part = slice(before_steps, steps)
        work = Iterations(
            step_s=stats.work.step_s[part],
            running=stats.work.running[part],
            prefill=stats.work.prefill[part],
            num_prefilled=sum(stats.work.prefill[part]),
        )
        accounts.append(
            StepAccount(
                trained=0,  # everything is held: the step never ends
                carried=0,
                held=tokens,
                generated=tokens - before_tokens,
                discarded=0,
                replayed=0,
                prefilled=sum(work.prefill),
                duration_s=seconds - before_s,
                busy_slot_s=work.slot_seconds(),
                offered_slot_s=sum(work.step_s) * stats.slots,
                work=work,
            )
        )
        before_s, before_tokens, before_steps = seconds, tokens, steps
    return accounts


def account_of(stats: RolloutStats, groups: list[Group], *, held: int) -> StepAccount:
    samples = [s for group in groups for s in group.samples]
    segments = [segment for s in samples for segment in s.segments]
    discarded = sum(sum(lengths) for lengths in stats.dropped_lengths.values())
    return StepAccount(
        trained=sum(len(s.token_ids) for s in segments),
        carried=sum(len(s.token_ids) for s in segments if s.policy_version < stats.step),
        held=held,
        generated=stats.num_generated,
        discarded=discarded,
        replayed=stats.num_replayed,
        prefilled=stats.num_prefill,
        duration_s=stats.duration_s,
        busy_slot_s=stats.work.slot_seconds(),
        offered_slot_s=stats.offered_slot_s,
        spans=tuple(s.version_span for s in samples),
        staleness=max((stats.step - s.policy_version for s in segments), default=0),
        work=stats.work,
    )


def no_scores() -> Scorer:
    """Every response gets the same reward: rewards are not part of the measurement."""
    return InlineScorer(lambda response, **_: 1.0, decode=lambda parts: "")

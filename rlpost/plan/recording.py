"""What a recorded run provides for a plan: response lengths, engine iterations, and the duration of each step's phases.

Reads ``config.yaml``, ``metrics.jsonl`` and ``timeline.jsonl`` of a run directory and nothing else. Steps are those
after the warm-up within the last :data:`WINDOW`; response lengths are those of all groups started in them, finished or
not, so that a short run's lengths are not those of its short responses. Called by ``plan.predict``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlpost.config import Config
from rlpost.config.compose import load_config
from rlpost.durable.run_state import CONFIG_FILE
from rlpost.errors import RunError, explain
from rlpost.reporting.metrics import read_steps
from rlpost.reporting.timeline import StepTimeline, read_timeline

WINDOW = 60  # the newest steps that are read: the simulator replays them all, and lengths drift
MIN_STEPS = 3  # fewer reveal nothing about the spread


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """One trained step. ``tokens``: trained, including prompts; times in seconds; ``iterations``: sums over the
    engines' iterations (``durable.run_record.RunRecord.sums``)."""

    step: int
    tokens: float
    idle_share: float
    slots: int
    iterations: list[dict[str, Any]]
    generate_s: float
    update_s: float
    publish_s: float
    other_s: float

    @property
    def step_s(self) -> float:
        return self.generate_s + self.update_s + self.publish_s + self.other_s


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedGroup:
    lengths: tuple[int, ...]  # whole responses, tokens
    dropped: bool  # by a filter, or because rewards failed
    first_step: int  # the first step that generated for it


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """``replayed`` steps are those the simulator must reproduce, from the window's first on; ``steps`` are the ones
    among them that count."""

    run_dir: Path
    cfg: Config
    first_step: int
    steps: list[RecordedStep]
    groups: list[RecordedGroup]  # in the order drawn, from ``first_step`` on
    evaluations: list[dict[str, Any]]  # sums over the engines' iterations in evaluations after the warm-up
    prompt_tokens: float  # mean
    prefill_share: float  # computed share of the prompt and replayed tokens given to engines (not in a prefix cache)

    @property
    def typical_groups(self) -> list[RecordedGroup]:
        """Those started in the counted steps: a policy that learns responds differently at the run's beginning."""
        return [group for group in self.groups if group.first_step >= self.steps[0].step]

    @property
    def kv_slots(self) -> int | None:
        """Samples that the KV cache held in the typical step; None if it held as many as there are slots."""
        slots = int(statistics.median(step.slots for step in self.steps))
        return slots if slots < self.cfg.max_in_flight else None

    @property
    def num_replayed(self) -> int:
        return self.steps[-1].step - self.first_step + 1


@dataclass(slots=True)
class _Sample:
    tokens: int = 0
    finished: bool = False


@dataclass(slots=True)
class _Draw:
    """A group as it appears in the timeline."""

    first_step: int
    samples: dict[int, _Sample] = field(default_factory=dict)


def read_recording(run_dir: Path, *, warm_up: int) -> Recording:
    """``warm_up``: steps skipped at the run's beginning.

    Raises RunError if the directory holds no run, an older version's, or fewer than MIN_STEPS usable steps.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise RunError(explain("from", f"{run_dir} without {CONFIG_FILE}", "a run directory", "check the path"))
    cfg = load_config([f"recipe={run_dir / CONFIG_FILE}"])
    timeline = read_timeline(run_dir)
    rows = {int(row["step"]): row for row in read_steps(run_dir) if "time/step" in row}
    window = [t for t in timeline if t.step in rows][-WINDOW:]
    _check(run_dir, cfg, window, warm_up)
    first = window[0].step
    if first > 1:  # responses in progress at its beginning are unknown: groups fill up first
        warm_up = max(warm_up, cfg.rollout.max_staleness + 2)
    used = {t.step for t in window if t.step >= first + warm_up}
    trained = [t for t in timeline if t.step in rows]
    draws, stays = _follow(trained)
    prompt_tokens, prefill_share = _prompts(stays, rows)

    def sums_of(phase: str, step: int) -> list[dict[str, Any]]:
        return [sums for t in window if t.step == step for sums in t.iterations if sums["phase"] == phase]

    return Recording(
        run_dir=run_dir,
        cfg=cfg,
        first_step=first,
        steps=[_step(rows[step], prompt_tokens, sums_of("generate", step)) for step in sorted(used)],
        groups=_complete({u: d for u, d in draws.items() if d.first_step >= first}, window, cfg),
        evaluations=[sums for step in sorted(used) for sums in sums_of("eval", step)],
        prompt_tokens=prompt_tokens,
        prefill_share=prefill_share,
    )


def _check(run_dir: Path, cfg: Config, window: Sequence[StepTimeline], warm_up: int) -> None:
    usable = max(0, len(window) - warm_up)
    if usable < MIN_STEPS:
        expected = f">= {MIN_STEPS} after {warm_up} of warm-up"
        raise RunError(explain("from", f"{run_dir} with {usable} steps", expected, "record a run of 10 steps"))
    if not any(t.iterations for t in window):
        do = "record it again: this version writes them"
        raise RunError(explain("from", f"{run_dir} without the engines' iterations", "a timeline with them", do))
    if cfg.rollout.on_stale != "schedule":
        raise RunError(explain("from", "rollout.on_stale=restart", "schedule", "record a run with it"))


@dataclass(slots=True)
class _Stays:
    """Sums over one step's stays in the engine."""

    num_started: int = 0  # that generated something and did not keep their KV cache from the previous step
    num_fresh: int = 0  # of samples without tokens
    num_resumed: int = 0  # of samples with tokens, which were replayed
    before: int = 0  # the number of those tokens
    num_unknown: int = 0  # of samples whose earlier stays were not recorded


def _follow(steps: Sequence[StepTimeline]) -> tuple[dict[str, _Draw], dict[int, _Stays]]:
    """Every group whose beginning was recorded, by uid, and the sums over stays by step."""
    draws: dict[str, _Draw] = {}
    stays: dict[int, _Stays] = {}
    unknown: set[str] = set()
    for t in steps:
        sums = stays[t.step] = _Stays()
        columns = (t.spans[name] for name in ("uid", "index", "tokens", "kind", "end"))
        for uid, index, tokens, kind, end in zip(*columns, strict=True):
            if uid in unknown or (uid not in draws and kind != "launched"):
                unknown.add(uid)
                sums.num_unknown += 1
                continue
            sample = draws.setdefault(uid, _Draw(first_step=t.step)).samples.setdefault(index, _Sample())
            if sample.tokens and kind == "resumed":
                sums.num_resumed += 1
                sums.before += sample.tokens
            sums.num_fresh += not sample.tokens
            sums.num_started += tokens > 0 and kind != "kept"
            sample.tokens += tokens
            sample.finished = end in ("stop", "length")
    return draws, stays


def _prompts(stays: Mapping[int, _Stays], rows: Mapping[int, Mapping[str, float]]) -> tuple[float, float]:
    """(mean prompt length, computed share of the tokens given to engines), from the tokens the run counted.

    Replayed tokens are, for each resumed stay, a prompt and the tokens before it. If nothing was ever resumed, a
    prompt's length is what was computed of it.
    """
    known = {step: sums for step, sums in stays.items() if not sums.num_unknown}
    computed = sum(rows[step]["rollout/prefill_tokens"] for step in known)
    replayed = sum(rows[step]["rollout/replayed_tokens"] for step in known)
    fresh, resumed, before, started = (
        sum(getattr(sums, name) for sums in known.values())
        for name in ("num_fresh", "num_resumed", "before", "num_started")
    )
    if not resumed:
        return computed / max(1, fresh), 1.0
    prompt_tokens = max(0.0, replayed - before) / resumed
    return prompt_tokens, min(1.0, computed / max(1.0, prompt_tokens * started + before))


def _step(row: Mapping[str, float], prompt_tokens: float, iterations: list[dict[str, Any]]) -> RecordedStep:
    timed = {name: row[f"time/{name}"] for name in ("generate", "update", "publish")}
    return RecordedStep(
        step=int(row["step"]),
        tokens=row["loss/tokens"] + prompt_tokens * row["loss/sequences"],
        idle_share=row["rollout/idle_share"],
        slots=int(row["rollout/slots"]),
        iterations=iterations,
        generate_s=timed["generate"],
        update_s=timed["update"],
        publish_s=timed["publish"],
        other_s=row["time/step"] - sum(timed.values()),
    )


def _complete(draws: Mapping[str, _Draw], window: Sequence[StepTimeline], cfg: Config) -> list[RecordedGroup]:
    """The groups with complete lengths. A response that was never finished, c tokens long, gets the length of one of
    those longer than c, drawn at random; the longest first, so that every drawn one represents those it hid (the
    redistribute-to-the-right form of the Kaplan-Meier estimate)."""
    dropped = {uid for t in window for uid, _ in t.dropped}
    rng = np.random.default_rng(0)
    lengths: dict[str, list[int]] = {uid: [0] * cfg.rollout.samples_per_group for uid in draws}
    unfinished: list[tuple[int, str, int]] = []
    pool: list[int] = []
    for uid, draw in draws.items():
        for index in range(cfg.rollout.samples_per_group):
            sample = draw.samples.get(index, _Sample())
            if sample.finished:
                lengths[uid][index] = sample.tokens
                pool.append(sample.tokens)
            else:
                unfinished.append((sample.tokens, uid, index))
    for so_far, uid, index in sorted(unfinished, reverse=True):
        longer = [n for n in pool if n > so_far]
        lengths[uid][index] = int(rng.choice(longer)) if longer else max(1, so_far)
        pool.append(lengths[uid][index])
    return [
        RecordedGroup(lengths=tuple(lengths[uid]), dropped=uid in dropped, first_step=draw.first_step)
        for uid, draw in sorted(draws.items(), key=lambda item: _place(item[0]))
    ]


def _place(uid: str) -> tuple[Any, ...]:
    """A uid is ``epoch:position`` of its draw, behind the name of its source where there are several."""
    return tuple(int(part) for part in uid.rpartition("/")[2].split(":"))

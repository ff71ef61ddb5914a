"""The input of ``rlpost plan``: its own keys in addition to the configuration's, and their checks. No heavy imports.

``from=RUN_DIR`` names the recorded run, ``lengths=NAME`` a distribution that replaces its lengths, and ``cost.KEY=X``
gives a cost or replaces one that the run measured. Everything else is the configuration of the planned run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlpost.config import Config
from rlpost.config.locations import expand_home
from rlpost.errors import ConfigError, explain

# Keys below ``cost.``, with their meaning. All are seconds except ``prompt_tokens``.
COST_KEYS = {
    "iteration_s": "fixed cost of one decode iteration of an engine",
    "sample_s": "added per running sample",
    "prefill_s": "per prompt or replayed token",
    "rollout_s": "in addition to the iterations, once per rollout (starting, stopping, exchanges)",
    "update_s": "fixed cost of an update",
    "update_token_s": "added per token (prompt and response) on the rank with its share of them",
    "reduce_s": "collectives of an update over several ranks",
    "publish_s": "one publication of the weights",
    "other_s": "the rest of a step: ledger, scoring, logs",
    "prompt_tokens": "mean tokens per prompt",
}
OPTIONAL = ("rollout_s",)  # corrects the simulator; without a measurement there is nothing to correct
RATIOS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
PLAN_KEYS = ("from", "lengths", *(f"cost.{name}" for name in COST_KEYS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Steps are counted in the recorded run (``warm_up``, skipped) and in the simulation (``steps``, after its own)."""

    recording: Path | None = None
    lengths: str | None = None
    costs: dict[str, float] = field(default_factory=dict)
    ratios: Sequence[float] | None = None  # None: RATIOS and the configuration's own, within max_staleness
    steps: int = 30
    warm_up: int = 2
    repeats: int = 4


def split_keys(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(the plan's own keys, the configuration's overrides). Raises ConfigError for an unknown cost."""
    own: dict[str, str] = {}
    rest: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not (key in ("from", "lengths") or key.startswith("cost.")):
            rest.append(override)
            continue
        if key not in PLAN_KEYS:
            raise ConfigError(explain("cost", key, ", ".join(f"cost.{name}" for name in COST_KEYS), "name one of them"))
        if key in own:
            raise ConfigError(explain(key, value, "one value", f"{key}={own[key]} was already given"))
        own[key] = value
    return own, rest


def make_request(own: dict[str, str], *, steps: int, warm_up: int, repeats: int, ratios: str | None) -> Request:
    """The plan's own keys and options, as values. Raises ConfigError for an invalid one."""
    for option, value, least in (("--steps", steps, 1), ("--warm-up", warm_up, 0), ("--repeats", repeats, 2)):
        if value < least:
            raise ConfigError(explain(option, value, f">= {least}", "raise it"))
    costs = {key.removeprefix("cost."): _number(key, value) for key, value in own.items() if key.startswith("cost.")}
    return Request(
        recording=Path(expand_home(own["from"])) if "from" in own else None,
        lengths=own.get("lengths"),
        costs=costs,
        ratios=[_number("--ratios", r) for r in ratios.split(",")] if ratios else None,
        steps=steps,
        warm_up=warm_up,
        repeats=repeats,
    )


def check_request(cfg: Config, request: Request) -> None:
    """Raises ConfigError if there is nothing to predict from, or for a ratio that the staleness bound does not
    allow."""
    if request.recording is None:
        _check_given(cfg, request)
    most = cfg.rollout.max_staleness + 1
    for ratio in request.ratios or ():
        if not 1.0 <= ratio <= most:
            expected = f"1.0 to max_staleness + 1 = {most}"
            raise ConfigError(explain("--ratios", ratio, expected, "remove it, or raise rollout.max_staleness"))
    if cfg.rollout.on_stale != "schedule":
        do = "set rollout.on_stale=schedule: restarts are not simulated"
        raise ConfigError(explain("rollout.on_stale", cfg.rollout.on_stale, "schedule", do))


def choose_ratios(cfg: Config, request: Request) -> list[float]:
    """In ascending order; includes the configuration's own ratio."""
    most = cfg.rollout.max_staleness + 1
    wanted = request.ratios if request.ratios is not None else [r for r in RATIOS if r <= most]
    return sorted({*wanted, cfg.rollout.oversample})


def _check_given(cfg: Config, request: Request) -> None:
    record = "record a run: rlpost train recipe=... steps=10, then from=RUN_DIR"
    if request.lengths is None:
        raise ConfigError(explain("rlpost plan", "neither from= nor lengths=", "from=RUN_DIR", record))
    needed = [name for name in COST_KEYS if name not in OPTIONAL]
    if cfg.cluster.num_workers == 1:
        needed.remove("reduce_s")
    missing = [f"cost.{name}" for name in needed if name not in request.costs]
    if missing:
        expected = "each cost given, or a run that measured it"
        raise ConfigError(explain("costs", f"no {', '.join(missing)}", expected, record))


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(explain(key, text, "a number >= 0", "write it as 0.004 or 4e-3"))
    return value

"""Warnings that teach: what typically goes wrong in a run, one sentence each, given once. Metrics in, words out.

Every rule in :data:`RULES` looks at the steps so far and at a few facts from the configuration, and returns what it
sees, what that means and what to try, or nothing. ``reporting.reporter`` asks after each step, shows what is new and
appends it to ``warnings.jsonl``, which ``rlpost watch`` and the report read. Nothing here stops a run or changes a
number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rlpost.config import Config
from rlpost.prompts.encoding import PromptSet, fingerprint
from rlpost.reporting import thresholds
from rlpost.reporting.metrics import JsonLines, read_rows
from rlpost.types import Prompt

FILE = "warnings.jsonl"
WINDOW = 3  # steps a rule looks at

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Advice:
    name: str
    text: str
    is_urgent: bool = False  # worth an alert: if ignored, the run is lost


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the rules need to know about the configuration and the data."""

    april: bool
    has_filter: bool
    max_response_tokens: int
    mismatch_stop: float  # nats
    num_eval_prompts: int
    num_eval_prompts_in_train: int


def facts_of(cfg: Config, train: Sequence[PromptSet], evaluation: Sequence[Prompt]) -> Facts:
    known = np.array([fingerprint(prompt) for prompt in evaluation], np.int64)
    trained_on = np.concatenate([one.fingerprints for one in train]) if train else known[:0]
    return Facts(
        april=cfg.rollout.oversample > 1.0 or cfg.rollout.adaptive_oversample,
        has_filter=cfg.algo.filter != "none",
        max_response_tokens=cfg.rollout.max_response_tokens,
        mismatch_stop=cfg.mismatch_stop,
        num_eval_prompts=len(evaluation),
        num_eval_prompts_in_train=int(np.isin(known, trained_on).sum()),
    )


class Adviser:
    """Remembers the steps so far and the warnings given."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._first: list[Row] = []  # the steps that later ones are compared with
        self._last: list[Row] = []
        self._said: set[str] = set()

    def recall(self, steps: Sequence[Row], said: Collection[str]) -> None:
        """A run resumes: its steps so far, oldest first, and the names of the warnings it has given."""
        for row in steps:
            self._remember(row)
        self._said = set(said)

    def look(self, metrics: Row | None = None) -> list[Advice]:
        """The new warnings after a step with these metrics, or before the first one (None)."""
        if metrics is not None:
            self._remember(metrics)
        found = []
        for name, (rule, urgent) in RULES.items():
            text = None if name in self._said else rule(self._first, self._last, self._facts)
            if text is not None:
                self._said.add(name)
                found.append(Advice(name, text, urgent))
        return found

    def _remember(self, row: Row) -> None:
        if "loss/tokens" not in row:  # an evaluation without a step
            return
        if len(self._first) < WINDOW:
            self._first.append(row)
        self._last = [*self._last, row][-WINDOW:]


class WarningsFile:
    """``warnings.jsonl``: {"step", "name", "text", "wakes"}, one line per warning given."""

    def __init__(self, run_dir: Path) -> None:
        self._log = JsonLines(run_dir / FILE)
        self._path = run_dir / FILE

    def append(self, step: int, advice: Advice) -> None:
        self._log.append({"step": step, "name": advice.name, "text": advice.text, "wakes": advice.is_urgent})

    def rewind(self, step: int | None) -> list[str]:
        """Drop what came after ``step``; None: a run without a checkpoint starts over, nothing is kept. Returns the
        names that remain."""
        self._log.cut(lambda row: step is not None and row["step"] <= step)
        return [row["name"] for row in read_rows(self._path)]

    def close(self) -> None:
        self._log.close()


def read_warnings(run_dir: Path) -> list[dict[str, Any]]:
    """The warnings a run has given, oldest first."""
    path = run_dir / FILE
    return read_rows(path) if path.exists() else []


# ---- the rules -------------------------------------------------------------------------------------------------------
# Each: (first steps, last steps, facts) -> the sentence, or None; ``_median`` is None until WINDOW steps have a number.


def shared_prompts(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    shared, all_ = facts.num_eval_prompts_in_train, facts.num_eval_prompts
    if not shared:
        return None
    return (
        f"{shared} of {all_} evaluation prompts are also trained on: accuracy will look better than it is; "
        "remove them from data.train or from data.eval"
    )


def constant_reward(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    if len(last) < WINDOW or len({row.get(f"reward/{end}") for row in last for end in ("min", "max")}) != 1:
        return None
    value = last[-1]["reward/max"]
    if value <= 0:
        do = (
            "look at responses in rollouts/ and call the reward on a correct one: is the response cut off, or is its "
            "format not what the reward expects? If the task is too hard, start from easier prompts or a warm start"
        )
    else:
        do = "the task is solved or the reward accepts everything: look at responses in rollouts/, use harder prompts"
    return f"every reward of the last {WINDOW} steps was {value:g}, so nothing can be learned: {do}"


def filtered_groups(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    accepted = _median(last, "rollout/accepted_share")
    if not facts.has_filter or accepted is None or accepted > thresholds.ACCEPTED_SHARE:
        return None
    return (
        f"the filter rejected {1 - accepted:.0%} of the groups of the last {WINDOW} steps: most of what is generated "
        "is discarded; use prompts neither too easy nor too hard, more samples_per_group, or algo.filter=none"
    )


def equal_groups(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    equal = _median(last, "reward/equal_groups_share")
    constant = constant_reward(first, last, facts) is not None
    if constant or equal is None or equal <= thresholds.EQUAL_GROUPS_SHARE:
        return None
    return (
        f"in {equal:.0%} of the groups of the last {WINDOW} steps all responses had the same reward: these groups have "
        "no gradient; use prompts of medium difficulty, more samples_per_group, or algo.filter=dynamic_sampling"
    )


def truncated(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    share = _median(last, "rollout/truncated_share")
    if share is None or share <= thresholds.TRUNCATED_SHARE:
        return None
    return (
        f"{share:.0%} of the responses of the last {WINDOW} steps were cut at {facts.max_response_tokens} tokens, and "
        "a cut response is rarely correct: raise rollout.max_response_tokens, check that responses end with a stop "
        "token, or penalize length softly with algo.overlong.buffer_share"
    )


def entropy_collapse(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    before, now = _median(first, "loss/entropy"), _median(last, "loss/entropy")
    reward, best = _median(last, "reward/mean"), _median(last, "reward/max")
    if before is None or now is None or now > before / thresholds.ENTROPY_FALL or reward is None or best is None:
        return None
    if best - reward < thresholds.MANY_WRONG:  # nearly every response is correct: low entropy is the goal
        return None
    return (
        f"entropy fell from {before:.3g} to {now:.3g} nats while many responses are still incorrect: the policy gives "
        "nearly the same response each time and no longer explores; lower train.lr, raise algo.clip_high (0.28 in "
        "DAPO), or set algo.entropy_coef or algo.kl_coef"
    )


def length_collapse(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    before, now = (_median(rows, "rollout/length/admitted_mean") for rows in (first, last))
    if before is None or now is None or now > before / thresholds.LENGTH_FALL:
        return None
    return (
        f"responses shrank from {before:.0f} to {now:.0f} tokens: the policy may have found that short responses pay "
        "off; read a few in rollouts/, check rewards that depend on length, lower train.lr"
    )


def growing_mismatch(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    name = "mismatch/lag_0/abs_log_ratio"
    before, now = _median(first, name), _median(last, name)
    if before is None or now is None or now < thresholds.MISMATCH_RISE * before:
        return None
    if now < thresholds.MISMATCH_PART_OF_STOP * facts.mismatch_stop:
        return None
    return (
        f"engine and trainer are drifting apart: their logprobs of the same tokens differ by {now:.2g} nats, up from "
        f"{before:.2g}, and the run stops at {facts.mismatch_stop:g}; lower train.lr to keep the weights in the range "
        "that model.dtype resolves, or set model.dtype=float32, which removes most of it"
    )


def idle_tail(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    idle = _median(last, "rollout/idle_share")
    if not facts.april or idle is None or idle <= thresholds.IDLE_SHARE:
        return None
    return (
        f"{idle:.0%} of the engine's slots were empty although partial rollouts are on: too few responses are open to "
        "fill them; raise rollout.oversample (and rollout.max_staleness), or lower engine.max_slots"
    )


def full_kv_cache(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    names = ("rollout/preemptions", "rollout/launched_samples", "rollout/resumed_samples")
    preempted, *started = (sum(row.get(name, 0) for row in last) for name in names)
    if len(last) < WINDOW or preempted <= thresholds.PREEMPTED_SHARE * sum(started):
        return None
    return (
        f"vLLM preempted {preempted:.0f} responses in the last {WINDOW} steps: the KV cache was full, and their tokens "
        "were recomputed; lower rollout.max_in_flight (or leave it unset), or raise engine.kv_cache_bytes"
    )


def failing_rewards(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    failed, scored = (sum(row.get(name, 0) for row in last) for name in ("reward/failed", "loss/sequences"))
    if len(last) < WINDOW or failed <= thresholds.FAILED_REWARDS_SHARE * (failed + scored):
        return None
    return (
        f"{failed:.0f} rewards of the last {WINDOW} steps failed, {failed / (failed + scored):.0%} of all, and their "
        "responses train nothing: see the reason in the run's output and in the column failure of rollouts/; fix the "
        "function, or raise reward.timeout_s"
    )


def skipped_updates(first: Sequence[Row], last: Sequence[Row], facts: Facts) -> str | None:
    if not last or not last[-1].get("loss/skipped_updates"):
        return None
    return (
        "a loss or gradient was NaN or infinite, and that update was skipped: if it happens again, lower train.lr, set "
        "train.grad_clip, or use model.dtype=float32 to find out why"
    )


Rule = Callable[[Sequence[Row], Sequence[Row], Facts], str | None]
RULES: dict[str, tuple[Rule, bool]] = {  # name -> (rule, whether its warning is urgent)
    "shared_prompts": (shared_prompts, False),
    "constant_reward": (constant_reward, False),
    "filtered_groups": (filtered_groups, False),
    "equal_groups": (equal_groups, False),
    "truncated": (truncated, False),
    "entropy_collapse": (entropy_collapse, True),
    "length_collapse": (length_collapse, True),
    "growing_mismatch": (growing_mismatch, True),
    "idle_tail": (idle_tail, False),
    "full_kv_cache": (full_kv_cache, False),
    "failing_rewards": (failing_rewards, True),
    "skipped_updates": (skipped_updates, True),
}


def _median(rows: Sequence[Row], name: str) -> float | None:
    """The median, so that a single unusual step does not count."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(median(values)) if len(values) == WINDOW else None

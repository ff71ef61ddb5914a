"""The policy's update on one rollout, and what it came to: which groups it trained, whether engine and trainer agree.

``loop`` calls :func:`update_policy` once per step. Joins ``algos`` (what is trained) and a trainer (how).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlpost.algos.algorithm import Algorithm
from rlpost.algos.batch import build_batches, response_logprobs, reward_kl, with_advantages
from rlpost.errors import RunError, explain
from rlpost.train.protocol import PolicyTrainer, UpdateResult
from rlpost.types import Group, TrainBatch

SKIPPED = {
    "nan_update": "had their update skipped, loss or gradient being NaN or infinite",
    "nothing_to_train": "hold no token to train on",
}

Timed = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateSettings:
    max_row_tokens: int
    optimizer_steps: int  # over disjoint parts of the rollout
    epochs: int
    record_logprobs: bool = False  # the trainer's, at the start of the update, also where the loss does not need them


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What a rollout was trained on, and what each optimizer step said."""

    advantages: list[Any]  # per group f64[scored samples], or one f64[R] per scored sample
    old_logprobs: list[list[np.ndarray | None]] | None  # f32[R] per scored sample, where the trainer computed them
    batches: list[TrainBatch]
    results: list[UpdateResult]  # epoch by epoch, one for each batch; none where there was no token to train on
    failed: dict[str, str]  # uid -> why the group was trained by none of them

    @property
    def mismatch(self) -> float | None:
        """Mean |old - rollout| logprob of current-version tokens, nats, None where there are none.

        The first optimizer step's: later ones may hold the update's own movement.
        """
        return self.results[0].metrics.get("mismatch/lag_0/abs_log_ratio") if self.results else None


def update_policy(
    trainer: PolicyTrainer,
    algorithm: Algorithm,
    groups: Sequence[Group],
    *,
    policy_version: int,
    settings: UpdateSettings,
    timed: Timed,
) -> Update:
    """Train ``policy_version`` on its rollout: one pass per epoch, one optimizer step per part of it.

    timed: ``timed(part)`` takes the time of build_batch, old_logprobs, ref_logprobs and train.
    """
    with timed("build_batch"):
        batches = build_batches(
            groups,
            policy_version=policy_version,
            max_row_tokens=settings.max_row_tokens,
            num_parts=settings.optimizer_steps,
        )
        old_logprobs = None
        if algorithm.needs_old_logprobs or settings.record_logprobs:
            scored = [_with_logprobs(trainer, batch, "old_logprobs", timed) for batch in batches]
            old_logprobs = response_logprobs(scored, groups)
            if algorithm.needs_old_logprobs:  # else they are for the record, and what is trained stays as it was
                batches = scored
        if algorithm.needs_reference:
            batches = [_with_logprobs(trainer, batch, "ref_logprobs", timed) for batch in batches]
        kl_sums = reward_kl(batches, groups) if algorithm.kl_in_reward else None
        advantages = algorithm.advantages(groups, kl_sums)
        batches = with_advantages(batches, advantages)
        results = []
        for _ in range(settings.epochs):
            for batch in batches:
                with timed("train"):
                    results.append(trainer.update(batch, algorithm.objective))
    return Update(
        advantages=advantages,
        old_logprobs=old_logprobs,
        batches=batches,
        results=results,
        failed=find_untrained(groups, batches, results),
    )


def find_untrained(
    groups: Sequence[Group], batches: Sequence[TrainBatch], results: Sequence[UpdateResult]
) -> dict[str, str]:
    """uid -> reason, of the groups whose part of the rollout no optimizer step was applied to."""
    failed = {group.uid: "nothing_to_train" for group in groups}
    for number, batch in enumerate(batches):
        applied = any(result.applied for result in results[number :: len(batches)])
        for uid in {groups[g].uid for g, _ in batch.owners}:
            failed[uid] = "nan_update"
            if applied:
                del failed[uid]
    return failed


def check_mismatch(mismatch: float | None, *, stop: float, step: int) -> str:
    """A warning from a tenth of ``stop`` nats on, or nothing. Raises RunError above ``stop``."""
    if mismatch is None or mismatch <= stop / 10:
        return ""
    line = explain(
        f"step {step}: mean |old - rollout| logprob of current-version tokens",
        f"{mismatch:.3g} nats",
        f"below mismatch_stop / 10 = {stop / 10:g}",
        "engine and trainer drift apart; check dtype and sampling settings",
    )
    if mismatch > stop:
        raise RunError(line)
    return f"warning: {line}"


def _with_logprobs(trainer: PolicyTrainer, batch: TrainBatch, field: str, timed: Timed) -> TrainBatch:
    """The batch scored by the policy as it is now (``old_logprobs``) or by the frozen reference (``ref_logprobs``)."""
    with timed(field):
        logprobs = trainer.logprobs(batch.rows, reference=field == "ref_logprobs")
    rows: list[Any] = [replace(row, **{field: values}) for row, values in zip(batch.rows, logprobs, strict=True)]
    return replace(batch, rows=tuple(rows))

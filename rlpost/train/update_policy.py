"""What a rollout's update came to: which groups it trained, and whether engine and trainer agree. The loop asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlpost.errors import RunError, explain
from rlpost.train.protocol import UpdateResult
from rlpost.types import Group, TrainBatch

SKIPPED = {
    "nan_update": "had their update skipped, loss or gradient being NaN or infinite",
    "nothing_to_train": "hold no token to train on",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """What a rollout was trained on, and what each optimizer step said."""

    advantages: list[np.ndarray]  # f64[scored samples] per group
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


def find_untrained(groups: Sequence[Group], num_parts: int, results: Sequence[UpdateResult]) -> dict[str, str]:
    """uid -> reason, of the groups whose part of the rollout no optimizer step was applied to."""
    from rlpost.algos.batch import split_parts

    failed = {group.uid: "nothing_to_train" for group in groups}
    parts = split_parts(groups, num_parts)
    for number, part in enumerate(parts):
        applied = any(result.applied for result in results[number :: len(parts)])
        for uid in {groups[g].uid for g, _ in part}:
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

"""The learning rate of each optimizer step, as one pure function. Called by ``train.deepspeed_trainer``."""

from __future__ import annotations

import math


def lr_at(step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int, final_share: float) -> float:
    """The learning rate of optimizer step ``step`` (0 is the first).

    Warm-up is linear and its last step runs at ``peak``: ``peak (step + 1) / warmup_steps``. Afterwards, with
    ``x = (step - warmup_steps) / (total_steps - warmup_steps)`` in [0, 1], the share of the peak is 1 (constant),
    ``1 - (1 - final_share) x`` (linear) or ``final_share + (1 - final_share) (1 + cos(pi x)) / 2`` (cosine).
    Beyond ``total_steps`` it stays at the final value.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    x = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1.0 - (1.0 - final_share) * x)
    if schedule == "cosine":
        return peak * (final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * x)))
    raise AssertionError(f"unknown schedule {schedule!r}: preflight lets only constant, linear and cosine pass")

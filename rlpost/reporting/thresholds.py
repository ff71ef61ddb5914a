"""Where a number begins to be worth a look: one home for these borders.

``advice`` warns beyond those of the first part, the report draws those of the second (``borders``), and the column
*Healthy* of ``metric_names`` tells the second in words; a test compares the two. All of them are
judgement, not measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# ---- warnings, of the median over three steps ------------------------------------------------------------------------

ACCEPTED_SHARE = 0.2  # of the groups; the filter rejected the rest
EQUAL_GROUPS_SHARE = 0.8
TRUNCATED_SHARE = 0.3
IDLE_SHARE = 0.3
PREEMPTED_SHARE = 0.1  # of the answers started in a step
FAILED_REWARDS_SHARE = 0.1
ENTROPY_FALL = 10.0  # times as low as at first
MANY_WRONG = 0.1  # the best reward minus the mean: with less, certainty is what was wanted
LENGTH_FALL = 4.0  # times as short as at first
MISMATCH_RISE = 5.0  # times as large as at first
MISMATCH_PART_OF_STOP = 1 / 50  # and above this part of mismatch_stop

# ---- borders in the report -------------------------------------------------------------------------------------------

APPROX_KL = 0.05  # nats, per rollout
CLIPPED_SHARE = 0.1
MISMATCH_FLOAT32, MISMATCH_BFLOAT16 = 1e-4, 0.05  # nats, tokens of the current version


def borders(config: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> border, for a run of this configuration; a metric that is not there has none."""
    exact = config.get("model", {}).get("dtype") == "float32"
    known: dict[str, float] = {
        "loss/approx_kl": APPROX_KL,
        "loss/clip_low_share": CLIPPED_SHARE,
        "loss/clip_high_share": CLIPPED_SHARE,
        "mismatch/lag_0/abs_log_ratio": MISMATCH_FLOAT32 if exact else MISMATCH_BFLOAT16,
    }
    max_staleness = config.get("rollout", {}).get("max_staleness")
    if max_staleness is not None:
        known["rollout/buffer_age"] = max_staleness
    return known

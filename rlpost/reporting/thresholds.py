"""The values beyond which a metric deserves attention: the only home of these thresholds.

``advice`` warns beyond those in the first part, the report draws those in the second (``borders``), and the column
*Healthy* of ``metric_names`` states the second in words; a test compares the two. All of them are judgment calls, not
measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# ---- warnings, of the median over three steps ------------------------------------------------------------------------

ACCEPTED_SHARE = 0.2  # of the groups; the filter rejected the rest
EQUAL_GROUPS_SHARE = 0.8
TRUNCATED_SHARE = 0.3
IDLE_SHARE = 0.3
PREEMPTED_SHARE = 0.1  # of the responses started in a step
FAILED_REWARDS_SHARE = 0.1
ENTROPY_FALL = 10.0  # factor below its initial value
MANY_WRONG = 0.1  # best reward minus mean reward: below this, low entropy is the goal
LENGTH_FALL = 4.0  # factor below its initial value
MISMATCH_RISE = 5.0  # factor above its initial value
MISMATCH_PART_OF_STOP = 1 / 50  # and above this fraction of mismatch_stop

# ---- borders in the report -------------------------------------------------------------------------------------------

APPROX_KL = 0.05  # nats, per rollout
CLIPPED_SHARE = 0.1
MISMATCH_FLOAT32, MISMATCH_BFLOAT16 = 1e-4, 0.05  # nats, tokens of the current version


def borders(config: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> threshold, for a run with this configuration; other metrics have none."""
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

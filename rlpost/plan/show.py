"""A plan as text: the table that ``rlpost plan`` prints, and the same as JSON. Pure functions."""

from __future__ import annotations

import json
from dataclasses import asdict

from rlpost.plan.predict import Plan, Row
from rlpost.plan.request import COST_KEYS

BAD_REPLAY = 0.15  # a replay with a larger error has missed something that the correction only hides


def as_json(plan: Plan) -> str:
    return json.dumps(asdict(plan), indent=1)


def as_text(plan: Plan) -> str:
    lines = [*_table(plan), "", f"best: oversample {_ratio(plan.best)}: {plan.reason}", "", *_costs(plan)]
    if plan.check is not None:
        lines += ["", *_check(plan)]
    if plan.extrapolated:
        lines += ["", "extrapolated, not measured:", *(f"  {note}" for note in plan.extrapolated)]
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    head = f"{'oversample':>10} {'step s':>8} {'+-':>6} {'generate':>9} {'update':>8} {'publish':>8} {'other':>8} "
    head += f"{'idle':>6} {'carried':>8} {'tokens/s':>9} {'+-':>6}"
    return [head, *(_line(row, row.oversample == plan.configured) for row in plan.rows)]


def _line(row: Row, is_configured: bool) -> str:
    line = (
        f"{_ratio(row.oversample):>10} {row.step_s:8.3f} {2 * row.step_s_error:6.3f} {row.generate_s:9.3f} "
        f"{row.update_s:8.3f} {row.publish_s:8.3f} {row.other_s:8.3f} {row.idle_share:6.1%} {row.carried_share:8.1%} "
        f"{row.trained_tokens_per_s:9,.0f} {2 * row.trained_tokens_per_s_error:6,.0f}"
    )
    return line + ("  <- configured" if is_configured else "")


def _costs(plan: Plan) -> list[str]:
    values = asdict(plan.costs)
    return ["costs:", *(f"  cost.{name:15} {values[name]:10.4g}  {meaning}" for name, meaning in COST_KEYS.items())]


def _check(plan: Plan) -> list[str]:
    check = plan.check
    assert check is not None
    off = check.simulated_generate_s / check.measured_generate_s - 1
    lines = [
        f"the recorded run, replayed over {check.steps} steps: generation {check.simulated_generate_s:.3f} s per step, "
        f"measured {check.measured_generate_s:.3f} s ({off:+.1%}; cost.rollout_s corrects for it); its median step "
        f"took {check.measured_step_s:.3f} s"
    ]
    if abs(off) > BAD_REPLAY:
        lines.append(
            f"warning: the replay is off by more than {BAD_REPLAY:.0%}: rewards that rollouts wait for, lost workers, "
            "or a machine that was busy with something else; predictions are off by as much"
        )
    return lines


def _ratio(ratio: float | str) -> str:
    return ratio if isinstance(ratio, str) else f"{ratio:g}"

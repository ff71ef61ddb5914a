"""Which parts an algorithm can be made of: names -> dotted paths, imported only when resolved.

A new part is a function and a line here. ``check_algo`` is what ``rlpost check`` calls: it imports no part, hence no
torch. Signatures of each kind of part stand in the module that holds ours, and in docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlpost.config import AlgoConfig, plugins
from rlpost.errors import ConfigError, explain


@dataclass(frozen=True, slots=True)
class Part(plugins.Part):
    """A part that ships, and what the program must know of it beside where it lies."""

    compares_group: bool = False  # of advantages and filters: a group of one sample gives it nothing to work with
    in_reward: bool = False  # of KL estimators: subtracted from the reward, not added to the loss


ADVANTAGES = {
    "grpo": Part("rlpost.algos.advantages.grpo", compares_group=True),
    "dr_grpo": Part("rlpost.algos.advantages.dr_grpo", compares_group=True),
    "rloo": Part("rlpost.algos.advantages.rloo", compares_group=True),
    "reinforce_pp": Part("rlpost.algos.advantages.reinforce_pp"),
    "reinforce_pp_baseline": Part("rlpost.algos.advantages.reinforce_pp_baseline", compares_group=True),
}
LOSSES = {
    "clipped": Part("rlpost.algos.losses.clipped"),
    "gspo": Part("rlpost.algos.losses.gspo"),
    "cispo": Part("rlpost.algos.losses.cispo"),
}
REDUCTIONS = {
    "token_mean": Part("rlpost.algos.reduction.token_mean"),
    "sequence_mean": Part("rlpost.algos.reduction.sequence_mean"),
    "constant_length": Part("rlpost.algos.reduction.constant_length"),
}
FILTERS = {
    "none": Part("rlpost.algos.filters.none"),
    "dynamic_sampling": Part("rlpost.algos.filters.dynamic_sampling", compares_group=True),
}
CORRECTIONS = {
    "token_truncate": Part("rlpost.algos.correction.token_truncate"),
    "token_mask": Part("rlpost.algos.correction.token_mask"),
    "sequence_truncate": Part("rlpost.algos.correction.sequence_truncate"),
    "sequence_mask": Part("rlpost.algos.correction.sequence_mask"),
    "none": Part("rlpost.algos.correction.none"),
}
KL_ESTIMATORS = {
    "k1": Part("rlpost.algos.kl.k1", in_reward=True),
    "k2": Part("rlpost.algos.kl.k2"),
    "k3": Part("rlpost.algos.kl.k3"),
}
# The kind of a part is its key in AlgoConfig.
TABLES: Mapping[str, Mapping[str, Part]] = {
    "advantage": ADVANTAGES,
    "loss": LOSSES,
    "reduction": REDUCTIONS,
    "filter": FILTERS,
    "correction": CORRECTIONS,
    "kl_estimator": KL_ESTIMATORS,
}
OLD_LOGPROBS = ("trainer", "rollout")


def resolve(kind: str, value: Any) -> Callable[..., Any]:
    """The part of this kind that ``value`` names (see :mod:`rlpost.config.plugins`); raises ConfigError."""
    return plugins.resolve_target(value, TABLES[kind], f"algo.{kind}")


def find(kind: str, value: Any) -> Part | None:
    """The table's entry that ``value`` names; None for a user's own part."""
    return plugins.find_part(value, TABLES[kind])


def check_algo(cfg: AlgoConfig, *, max_response_tokens: int | None = None) -> None:
    """Raises ConfigError for names that do not exist and numbers that cannot work; imports no part."""
    for kind, table in TABLES.items():
        plugins.check_target(getattr(cfg, kind), table, f"algo.{kind}")
    if cfg.old_logprobs not in OLD_LOGPROBS:
        raise ConfigError(explain("algo.old_logprobs", cfg.old_logprobs, " or ".join(OLD_LOGPROBS), "choose one"))
    _require(0 <= cfg.clip_low <= 1, "clip_low", cfg.clip_low, "0 to 1", "the ratio's lower bound is 1 - clip_low")
    _require(cfg.clip_high >= 0, "clip_high", cfg.clip_high, ">= 0", "the ratio's upper bound is 1 + clip_high")
    dual = cfg.dual_clip
    _require(dual is None or dual > 1, "dual_clip", dual, "> 1 or null", "use 3.0, or null to switch it off")
    _require(cfg.advantage_eps >= 0, "advantage_eps", cfg.advantage_eps, ">= 0", "use 1e-6")
    _require(cfg.kl_coef >= 0, "kl_coef", cfg.kl_coef, ">= 0", "use 0 to switch the reference off")
    _require(cfg.correction_cap > 0, "correction_cap", cfg.correction_cap, "> 0", "use 2.0")
    floor, cap = cfg.correction_floor, cfg.correction_cap
    _require(0 <= floor < cap, "correction_floor", floor, f"0 to correction_cap ({cap})", "lower it")
    length = cfg.constant_length
    _require(length is None or length >= 1, "constant_length", length, ">= 1 or null", "null: max_response_tokens")
    buffer = cfg.overlong.buffer_tokens
    fits = buffer >= 0 and (max_response_tokens is None or buffer <= max_response_tokens)
    expected = f"0 to rollout.max_response_tokens ({max_response_tokens or 'not given'})"
    _require(fits, "overlong.buffer_tokens", buffer, expected, "shorten the buffer; 0 is off")
    share = cfg.overlong.buffer_share
    _require(0 <= share <= 1, "overlong.buffer_share", share, "0 to 1", "0.2 is DAPO's; 0: off")
    _require(cfg.overlong.penalty >= 0, "overlong.penalty", cfg.overlong.penalty, ">= 0", "it is subtracted")
    _require(cfg.max_filtered_groups >= 1, "max_filtered_groups", cfg.max_filtered_groups, ">= 1", "use 512")


def _require(holds: bool, key: str, got: object, expected: str, do: str) -> None:
    if not holds:
        raise ConfigError(explain(f"algo.{key}", got, expected, do))

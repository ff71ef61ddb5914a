"""The parts an algorithm can be composed of: names -> dotted paths, imported only when resolved.

A new part is a function and a line here, and nothing else needs to change: the checks, ``rlpost config --keys`` and
docs/configuration.md read these tables. ``rlpost check`` calls ``check_algo``: it imports no part, hence no torch. The
signature of each kind of part is documented in the module that holds ours, and in docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlpost.config import AlgoConfig, look_up, plugins, walk_fields
from rlpost.config.rules import check_value
from rlpost.errors import ConfigError, explain


@dataclass(frozen=True, slots=True)
class Part(plugins.Part):
    """A part that ships, and what the program must know about it besides where it is."""

    compares_group: bool = False  # for advantages and filters: meaningless for a group of one sample
    by_function: bool = False  # for advantages: combines the reward's functions itself, so nothing can shape their sum
    in_reward: bool = False  # for KL estimators: subtracted from the reward, not added to the loss


ADVANTAGES = {
    "grpo": Part("rlpost.algos.advantages.grpo", compares_group=True),
    "dr_grpo": Part("rlpost.algos.advantages.dr_grpo", compares_group=True),
    "rloo": Part("rlpost.algos.advantages.rloo", compares_group=True),
    "reinforce_pp": Part("rlpost.algos.advantages.reinforce_pp"),
    "reinforce_pp_baseline": Part("rlpost.algos.advantages.reinforce_pp_baseline", compares_group=True),
    "gdpo": Part("rlpost.algos.advantages.gdpo", compares_group=True, by_function=True),
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
LENGTH_INSTEAD = "it normalizes each function of the reward; make the penalty one of reward.functions"
# The kind of a part is its key in AlgoConfig, whose rule names it as its table.
TABLES: Mapping[str, Mapping[str, Part]] = {
    "advantage": ADVANTAGES,
    "loss": LOSSES,
    "reduction": REDUCTIONS,
    "filter": FILTERS,
    "correction": CORRECTIONS,
    "kl_estimator": KL_ESTIMATORS,
}


def resolve(kind: str, value: Any) -> Callable[..., Any]:
    """The part of this kind that ``value`` names (see :mod:`rlpost.config.plugins`); raises ConfigError."""
    return plugins.resolve_target(value, TABLES[kind], f"algo.{kind}")


def find(kind: str, value: Any) -> Part | None:
    """The table's entry that ``value`` names; None for a user's own part."""
    return plugins.find_part(value, TABLES[kind])


def check_algo(cfg: AlgoConfig, *, max_response_tokens: int | None = None) -> None:
    """Raises ConfigError for unknown names and numbers that cannot work; imports no part."""
    for key in walk_fields(AlgoConfig):
        got, name = look_up(cfg, key.name), f"algo.{key.name}"
        if key.rule is not None and key.rule.table:
            plugins.check_target(got, TABLES[key.rule.table], name)
        check_value(name, got, key.rule)
    floor, cap = cfg.correction_floor, cfg.correction_cap
    if not floor < cap:
        raise ConfigError(explain("algo.correction_floor", floor, f"< algo.correction_cap = {cap}", "lower it"))
    buffer = cfg.overlong.buffer_tokens
    if max_response_tokens is not None and buffer > max_response_tokens:
        expected = f"<= rollout.max_response_tokens = {max_response_tokens}"
        raise ConfigError(explain("algo.overlong.buffer_tokens", buffer, expected, "shorten the buffer; 0 is off"))
    _check_shaping(cfg)


def _check_shaping(cfg: AlgoConfig) -> None:
    """Raises ConfigError for shaping of a sum of rewards that the estimator never forms."""
    part = find("advantage", cfg.advantage)
    if part is None or not part.by_function:
        return
    estimator = find("kl_estimator", cfg.kl_estimator)
    in_reward = cfg.kl_coef > 0 and estimator is not None and estimator.in_reward
    off = f"with algo.advantage={cfg.advantage}"
    for applies, key, got, expected, do in (
        (cfg.overlong.buffer_tokens > 0, "overlong.buffer_tokens", cfg.overlong.buffer_tokens, "0", LENGTH_INSTEAD),
        (cfg.overlong.buffer_share > 0, "overlong.buffer_share", cfg.overlong.buffer_share, "0", LENGTH_INSTEAD),
        (in_reward, "kl_estimator", cfg.kl_estimator, "an estimator in the loss", "use k2 or k3"),
    ):
        if applies:
            raise ConfigError(explain(f"algo.{key}", got, f"{expected} {off}", do))

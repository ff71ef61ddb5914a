"""Rewards: functions from a response to a number or to named parts. No heavy imports.

A reward function is called as ``fn(response, *, prompt, reference, finish_reason, columns)`` and returns a float, or
a dict of parts whose ``reward`` key (else the sum) is the total; it may take fewer keywords by accepting ``**_``.
``REWARDS`` names the ones that ship; a user's own is given by dotted path or ``_target_``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlpost import plugins
from rlpost.config import RewardConfig

REWARDS = {
    "exact_answer": "rlpost.rewards.answers.exact_answer",
    "gsm8k": "rlpost.rewards.answers.gsm8k",
    "last_number": "rlpost.rewards.answers.last_number",
    "digit_share": "rlpost.rewards.answers.digit_share",
    "code_functions": "rlpost.rewards.code.CodeFunctions",
    "code_stdio": "rlpost.rewards.code.CodeStdio",
}


def resolve_reward(cfg: RewardConfig) -> Callable[..., Any]:
    """``reward.function`` with ``reward.args`` bound (they win over the target's own); raises ConfigError."""
    function = cfg.function
    if cfg.args:
        spec = dict(function) if isinstance(function, Mapping) else {"_target_": function}
        function = {**spec, **cfg.args}
    return plugins.resolve_target(function, REWARDS, "reward.function")

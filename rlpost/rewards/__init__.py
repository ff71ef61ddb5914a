"""Rewards: functions from a response to a number or to named parts. No heavy imports.

A reward function is called as ``fn(response, *, prompt, reference, finish_reason, columns)`` and returns a float, or
a dict of parts whose ``reward`` key (else the sum) is the total; it is passed only the keywords it accepts. ``REWARDS``
names the ones that ship; a new one is a function and a line there. Users give their own by dotted path or ``_target_``.
``rewards.functions`` describes the other signatures, and how a function's return value or exception is handled.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlpost.config import plugins


@dataclass(frozen=True, slots=True)
class Shipped(plugins.Part):
    """A reward that ships, and what the program must know about it besides where it is."""

    reads_answer: bool = False  # not the thoughts before it: what reward.text=auto means for it
    loads_model: bool = False  # in every worker, so one worker is the default
    in_process: bool = False  # takes microseconds and cannot hang, so it needs no worker


REWARDS = {
    "exact_answer": Shipped("rlpost.rewards.library.answers.exact_answer", reads_answer=True, in_process=True),
    "gsm8k": Shipped("rlpost.rewards.library.answers.gsm8k", reads_answer=True, in_process=True),
    "last_number": Shipped("rlpost.rewards.library.answers.last_number", reads_answer=True, in_process=True),
    "digit_share": Shipped("rlpost.rewards.library.answers.digit_share", in_process=True),
    "format_match": Shipped("rlpost.rewards.library.answers.format_match", in_process=True),
    "math": Shipped("rlpost.rewards.library.math_answers.math_answer", reads_answer=True),
    "http": Shipped("rlpost.rewards.library.http_service.HttpReward"),
    "reward_model": Shipped("rlpost.rewards.library.reward_model.RewardModel", loads_model=True),
    "judge": Shipped("rlpost.rewards.library.judge.Judge"),
    "code_functions": Shipped("rlpost.rewards.library.code.CodeFunctions", reads_answer=True),
    "code_stdio": Shipped("rlpost.rewards.library.code.CodeStdio", reads_answer=True),
}

"""Rewards: functions from a response to a number or to named parts. No heavy imports.

A reward function is called as ``fn(response, *, prompt, reference, finish_reason, columns)`` and returns a float, or
a dict of parts whose ``reward`` key (else the sum) is the total; it is given the keywords that it takes.
``REWARDS`` names the ones that ship; a user's own is given by dotted path or ``_target_``. ``rewards.functions`` has
the other signatures, and what becomes of what a function returns or raises.
"""

from __future__ import annotations

REWARDS = {
    "exact_answer": "rlpost.rewards.library.answers.exact_answer",
    "gsm8k": "rlpost.rewards.library.answers.gsm8k",
    "last_number": "rlpost.rewards.library.answers.last_number",
    "digit_share": "rlpost.rewards.library.answers.digit_share",
    "format_match": "rlpost.rewards.library.answers.format_match",
    "math": "rlpost.rewards.library.math_answers.math_answer",
    "http": "rlpost.rewards.library.http_service.HttpReward",
    "code_functions": "rlpost.rewards.library.code.CodeFunctions",
    "code_stdio": "rlpost.rewards.library.code.CodeStdio",
}

"""Rewards: functions from a response to a number or to named parts. No heavy imports.

A reward function is called as ``fn(response, *, prompt, reference, finish_reason, columns)`` and returns a float, or
a dict of parts whose ``reward`` key (else the sum) is the total; it may take fewer keywords by accepting ``**_``.
``REWARDS`` names the ones that ship; a user's own is given by dotted path or ``_target_``.
"""

REWARDS = {
    "exact_answer": "rlpost.rewards.answers.exact_answer",
    "gsm8k": "rlpost.rewards.answers.gsm8k",
    "last_number": "rlpost.rewards.answers.last_number",
    "digit_share": "rlpost.rewards.answers.digit_share",
}

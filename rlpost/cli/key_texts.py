"""The texts about one key: what it may be and what it means, from the schema's rules and the tables of parts.

Used by ``rlpost config --keys`` and by ``rlpost.cli.config_reference``. The schema cannot name the parts itself: the
tables import it. Imports no part.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlpost.algos import table as algos
from rlpost.config import Key
from rlpost.config.plugins import Part
from rlpost.rewards import REWARDS
from rlpost.train import table as train

# What the tables say about a part besides where it is: the attribute, and the words before the names that have it.
FACTS = {
    "compares_group": "Comparing the samples of a group, of which there must be at least 2",
    "by_function": "Combining the functions of the reward itself, without shaping (overlong, k1)",
    "in_reward": "Subtracted from the reward, not added to the loss",
    "loads_model": "Loading a model into each worker, of which there is one unless reward.workers says otherwise",
    "in_process": "In the run's own process, because they take microseconds and cannot hang",
}


def allowed(key: Key, *, mark: str = "") -> str:
    """The options of a key, each between two ``mark``s, or its bounds; empty if any value of its type is valid."""
    rule = key.rule
    if rule is None:
        return ""
    if rule.table:
        # A key of type str cannot hold a mapping.
        own = "package.module.function" if key.type == "str" else "{_target_: ...}"
        return f"{', '.join(f'{mark}{name}{mark}' for name in _table_of(rule.table))}, or {mark}{own}{mark}"
    return ", ".join(f"{mark}{choice}{mark}" for choice in rule.choices) or rule.expected


def meaning(key: Key) -> str:
    """The key's doc and, if its options are parts that ship, what the table says about them."""
    sentences = [key.doc]
    if key.rule is not None and key.rule.table:
        parts = _table_of(key.rule.table)
        for fact, words in FACTS.items():
            names = [name for name, part in parts.items() if getattr(part, fact, False)]
            if names:
                sentences.append(f"{words}: {', '.join(names)}.")
    return " ".join(sentences)


def _table_of(name: str) -> Mapping[str, Part]:
    tables: Mapping[str, Mapping[str, Part]] = {**algos.TABLES, **train.TABLES, "reward": REWARDS}
    return tables[name]

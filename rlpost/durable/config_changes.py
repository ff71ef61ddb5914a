"""What a resume changes in the configuration: key by key, for people; refused if determinism would be lost."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlpost.config import walk_fields
from rlpost.config.locations import expand_home
from rlpost.config.resolve import WRITTEN_OUT
from rlpost.errors import RunError, explain

# Keys that control where and how a run is done and watched, not what it computes; ``*`` covers everything below.
HARMLESS = (
    "name",
    "description",
    "runs_dir",
    "resume",
    "ledger_dir",
    "watchdog_s",
    "engine.sleep",
    "checkpoint.*",
    "logging.*",
    "sft.*",
)
LATE_IN_DETERMINISTIC_MODE = (
    *("canary_threshold", "eval.max_response_tokens", "cluster.cpus_per_worker"),
    "train.grad_accum_dtype",  # new in 0.2; in float32 runs it changes nothing
)
# What was written out in bfloat16 where the threshold was left open, when the canary judged the largest difference.
EARLIER_CANARY_THRESHOLD = 0.3
HOW = ("resume", "recipe")  # these naturally differ


@dataclass(frozen=True, slots=True)
class Change:
    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def changed_keys(before: str, now: str) -> list[Change]:
    """Leaves that differ between two configurations in YAML; a key missing from one of them counts as None."""
    old, new = dict(_leaves(yaml.safe_load(before))), dict(_leaves(yaml.safe_load(now)))
    keys = [*new, *(key for key in old if key not in new)]
    changes = [Change(key, old.get(key), new.get(key)) for key in keys if key not in HOW]
    return [change for change in changes if _as_path(change.before) != _as_path(change.now)]


def _as_path(value: Any) -> Any:
    """Runs of version 0.1 wrote ``~`` as it was given."""
    return expand_home(value) if isinstance(value, str) else value


def was_left_open(change: Change, *, deterministic: bool) -> bool:
    """Whether an earlier version did not write the key, which is no change: it is new and has its default, or it was
    left open. Only since 0.2 is a run's configuration resolved as a whole (``config.resolve``), though in deterministic
    mode most of it was written out before."""
    if change.before is None and change.now is not None and change.now == _defaults().get(change.key):
        return True
    if change.key == "canary_threshold" and change.before == EARLIER_CANARY_THRESHOLD:
        return True
    keys = LATE_IN_DETERMINISTIC_MODE if deterministic else WRITTEN_OUT
    return change.key in keys and change.before in (None, "auto")


@functools.cache
def _defaults() -> dict[str, Any]:
    return {key.name: key.default for key in walk_fields()}


def is_harmless(key: str) -> bool:
    """Whether the key does not affect what a run computes."""
    return is_among(key, HARMLESS)


def is_among(key: str, names: Collection[str]) -> bool:
    """Whether ``names`` contains the key, or a prefix of it followed by ``*``."""
    return any(key == name or (name.endswith("*") and key.startswith(name[:-1])) for name in names)


def refuse_changes(changes: Sequence[Change], harmless: Collection[str] = HARMLESS) -> None:
    """Raises RunError for a change after which a deterministic run would no longer be the same."""
    for change in changes:
        if not is_among(change.key, harmless):
            do = "restore the old value, or use another name"
            raise RunError(
                explain(f"resuming with deterministic=true: {change.key}", change.now, repr(change.before), do)
            )


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node

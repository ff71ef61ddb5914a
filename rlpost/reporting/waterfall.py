"""Where a step's time went: parts that add up to it, in the order in which they happen.

Pure functions, except for :class:`Stopwatch`, which the reporter holds. Parts of a publication and of generation come
from their own measurements, parts of the update from the stopwatch; the rest is ``other``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlpost.rollout.stats import RolloutStats
from rlpost.workers.publication import Publication

PARTS = (
    *("canary", "copy", "fingerprint", "hand_over"),
    *("engine", "idle", "collect", "wait_for_rewards", "abort"),
    *("build_batch", "old_logprobs", "ref_logprobs", "train", "keep_state", "recover"),
    *("ledger", "record", "other"),
)


class Stopwatch:
    """Seconds by part since the last :meth:`take`. Time in a nested part counts for that part only."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def take(self) -> dict[str, float]:
        self._count()
        taken, self._spent = dict(self._spent), defaultdict(float)
        return taken

    def _count(self) -> None:
        now = self._clock()
        if self._open:
            self._spent[self._open[-1]] += now - self._since
        self._since = now


def of_publication(publication: Publication) -> dict[str, float]:
    """The time that is neither canary, copy nor fingerprint went to handing over the device."""
    known = {"canary": publication.canary_s, "copy": publication.load_s, "fingerprint": publication.fingerprint_s}
    return known | {"hand_over": max(0.0, publication.duration_s - sum(known.values()))}


def of_rollout(stats: RolloutStats, ledger_s: float) -> dict[str, float]:
    """``idle``: engine time x the share of empty slots. ``ledger_s`` is part of ``collect``'s own time.

    With several replicas, the loop's wall time is divided, not the sum of theirs.
    """
    in_engine = max(0.0, stats.work.wall_s - stats.work.own_s)
    idle = in_engine * stats.idle_share
    waited = stats.duration_s - stats.work.wall_s - stats.abort_s
    return {
        "engine": in_engine - idle,
        "idle": idle,
        "collect": max(0.0, stats.work.own_s - ledger_s),
        "wait_for_rewards": max(0.0, waited),
        "abort": stats.abort_s,
    }


def waterfall(step_s: float, *parts: dict[str, float]) -> dict[str, float]:
    """waterfall/ metrics of :data:`PARTS`; parts that took no time are left out, except for ``other``."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for given in parts:
        for name, spent in given.items():
            seconds[name] += spent
    unknown = set(seconds) - set(PARTS)
    assert not unknown, f"no parts of a step: {unknown}"
    seconds["other"] = step_s - sum(seconds.values())
    return {f"waterfall/{name}": seconds[name] for name in PARTS if seconds[name] or name == "other"}

"""How long a wait for workers' answers gathers what comes after the first one. Ray is played, on a clock of its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlpost.workers.cluster import actors
from rlpost.workers.cluster.actors import Actors


@pytest.mark.parametrize(("gather_s", "found"), [(0.0, ["a"]), (0.5, ["a", "b"]), (2.0, ["a", "b", "c"])])
def test_answers_that_come_while_they_are_gathered_are_found_together(
    monkeypatch: pytest.MonkeyPatch, gather_s: float, found: list[str]
) -> None:
    comes_at = {"a": 1.0, "b": 1.4, "c": 2.5}
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    def wait(refs: list[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        if timeout:  # until the first one is there
            clock.now = max(clock.now, min(comes_at[ref] for ref in refs))
        ready = [ref for ref in refs if comes_at[ref] <= clock.now][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    monkeypatch.setattr(actors, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock.now))
    monkeypatch.setattr(actors.ray, "wait", wait)
    waiting = SimpleNamespace(_beat=lambda: None)
    assert Actors.wait(waiting, ["a", "b", "c"], gather_s=gather_s) == found  # type: ignore[arg-type]

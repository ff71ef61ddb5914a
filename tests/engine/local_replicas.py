"""Replicas on a virtual clock in this process: the real replica loop on simulated engines, losses at will."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from rlpost.engine.replicas import Exchange, Loss, ReplicaLoop, Report
from rlpost.simulation.engine import SimulatedEngine


class LocalReplicas:
    """Implements ``rollout.replicas.Replicas``: of all exchanges under way, that of the replica that is furthest behind
    is run. ``die`` maps a replica to the number of exchanges it answers before it is lost."""

    def __init__(
        self, engines: Sequence[SimulatedEngine], *, exchange_s: float, die: dict[int, int] | None = None
    ) -> None:
        self.engines = list(engines)
        self.slots = [e.max_slots for e in engines]
        self.die = dict(die or {})
        self.loops = [
            ReplicaLoop(e, replica=n, exchange_s=exchange_s, halted=lambda: False) for n, e in enumerate(engines)
        ]
        self.inbox: list[deque[Exchange]] = [deque() for _ in engines]
        self.answered = [0] * len(engines)
        self.most_under_way = 0
        self.on_answer: Callable[[], None] = lambda: None

    def send(self, exchanges: Sequence[tuple[int, Exchange]]) -> None:
        for replica, exchange in exchanges:
            self.inbox[replica].append(exchange)
            self.most_under_way = max(self.most_under_way, len(self.inbox[replica]))

    def wait(self) -> Sequence[Report | Loss]:
        waiting = [n for n, box in enumerate(self.inbox) if box]
        assert waiting, "wait() with no exchange under way would wait for ever"
        return [self._answer(min(waiting, key=lambda n: self.engines[n].now()))]

    def _answer(self, n: int) -> Report | Loss:
        if self.answered[n] == self.die.get(n, -1):
            self.inbox[n].clear()
            return Loss(replica=n, reason=f"replica {n} was killed")
        self.answered[n] += 1
        return self.loops[n].run(self.inbox[n].popleft())

    def stop(self, replicas: Sequence[int]) -> Sequence[Report | Loss]:
        reports: list[Report | Loss] = []
        for n in replicas:
            while self.inbox[n] and not (reports and isinstance(reports[-1], Loss) and reports[-1].replica == n):
                reports.append(self._answer(n))
            if not (reports and isinstance(reports[-1], Loss) and reports[-1].replica == n):
                reports.append(self.loops[n].stop())
        return reports

    def now(self) -> float:
        return max(e.now() for e in self.engines)

"""Many engine replicas behind the interface of one engine, driven by exchanges instead of tokens.

:class:`ReplicaEngine` is what ``collect`` sees. It owns which replica holds which request; replicas live elsewhere (Ray
workers, or a virtual clock) behind the :class:`Replicas` transport. An *exchange* carries new requests to a replica,
which runs its engine for a while and replies with a *report*. Every replica that has work has two exchanges
outstanding, and holds some requests beyond its slots (the *reserve*), so that it waits neither for a reply nor for a
refill.

The controller does no work per token, nor per running sample and exchange: a finished sample arrives whole, and the new
tokens of those still running come as one block of arrays that is just stored. The block is opened only if the replica
is
lost: its samples are then returned with all tokens up to its last report.

Who waits for whom: ``step`` waits for the next report of any replica and, with many replicas, for those that come soon
after it (:func:`gather_s`); ``abort_all`` waits for the last report of each replica, at most as long as the transport
allows; after that the replica counts as lost.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from rlpost.engine.protocol import NOTHING, Delta, Engine, EngineStep, Iterations, KVCapacity, Request
from rlpost.errors import WorkerLost

IN_FLIGHT = 2  # outstanding exchanges per replica
EARLY_REPORT_SHARE = 0.1  # of an exchange's time: a replica with free slots reports this early
GATHER_SHARE = 0.025  # of an exchange's time: reports this soon after the first one are processed with it
GATHER_FROM = 16  # replicas: with fewer there is little to gather


def gather_s(num_replicas: int, exchange_s: float) -> float:
    """Seconds that a report may wait for others. Each turn of the controller has a fixed cost (choosing new samples,
    checking complete groups, querying Ray for every replica), and a full replica does not wait for its reply: another
    exchange is already outstanding. One with free slots waits this much longer for its refill."""
    return GATHER_SHARE * exchange_s if num_replicas >= GATHER_FROM else 0.0


class Exchange(NamedTuple):
    """The controller's message to a replica: take these requests, run for a while, report."""

    requests: Sequence[Request]
    has_more: bool = True  # samples are waiting: with free slots and an empty queue, report early


class TokenBlock(NamedTuple):
    """New tokens of samples that are still running, end to end. Requests are identified by their number among all that
    the replica was ever sent, which is cheaper to send and look up than their names."""

    numbers: np.ndarray  # i32[samples]
    lengths: np.ndarray  # i32[samples]
    token_ids: np.ndarray  # i32[sum of lengths]
    logprobs: np.ndarray  # f32[sum of lengths]


class Report(NamedTuple):
    """A replica's reply to one exchange, or to a stop."""

    replica: int
    ended: Sequence[Delta]  # all tokens since submission; after a stop, also the unfinished ones
    running: TokenBlock | None  # None after a stop
    iterations: Iterations


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A replica that will not reply any more."""

    replica: int
    reason: str


class Replicas(Protocol):
    """The transport to the replicas. Exchanges with one replica are answered in order."""

    slots: Sequence[int]  # per replica: samples it decodes at once

    def send(self, exchanges: Sequence[tuple[int, Exchange]]) -> None:
        """Send each exchange to the replica with its number."""

    def wait(self) -> Sequence[Report | Loss]:
        """At least one report or loss; called only while an exchange is outstanding."""

    def stop(self, replicas: Sequence[int]) -> Sequence[Report | Loss]:
        """End all requests of these replicas. Returns the outstanding reports and the last one of each, or its loss."""

    def now(self) -> float:
        """Seconds, monotonic."""


class ReplicaLoop:
    """The replica's side: runs one engine between two exchanges. Lives in the engine's process.

    Args:
        engine: this replica's, with ``reserve`` 0.
        replica: its number.
        exchange_s: duration of an exchange, in seconds of the engine's clock.
        halted: called between engine steps; True ends the exchange at once (a stop is on its way).
    """

    def __init__(self, engine: Engine, *, replica: int, exchange_s: float, halted: Callable[[], bool]) -> None:
        self._engine, self._replica, self._exchange_s, self._halted = engine, replica, exchange_s, halted
        self._queue: deque[Request] = deque()
        self._tokens: dict[str, list[Delta]] = {}  # of every request held: its deltas so far
        self._reported: dict[str, int] = {}  # how many of those have been reported
        self._numbers: dict[str, int] = {}  # of every request held; see TokenBlock
        self._num_taken = 0

    def run(self, exchange: Exchange) -> Report:
        for request in exchange.requests:
            self._queue.append(request)
            self._tokens[request.request_id] = []
            self._reported[request.request_id] = 0
            self._numbers[request.request_id] = self._num_taken
            self._num_taken += 1
        ended: list[Delta] = []
        iterations = Iterations()
        started = before = self._engine.now()
        while (self._queue or self._engine.num_in_flight) and not self._halted():
            self._fill()
            result = self._engine.step()
            ended += self._receive(result.deltas)
            now = self._engine.now()
            iterations.add_engine_step(now - before, result)
            before = now
            may_report_early = (
                exchange.has_more and not self._queue and self._engine.num_in_flight < self._engine.max_slots
            )
            if now - started >= self._exchange_s * (EARLY_REPORT_SHARE if may_report_early else 1.0):
                break
        return Report(replica=self._replica, ended=ended, running=self._block(), iterations=iterations)

    def stop(self) -> Report:
        """Abort everything; unfinished samples are handed over whole, those never started with no tokens."""
        ended = self._receive(self._engine.abort_all().deltas)
        ended += [_joined(request_id, parts, "") for request_id, parts in self._tokens.items()]
        self._queue.clear()
        self._tokens.clear()
        self._reported.clear()
        self._numbers.clear()
        return Report(replica=self._replica, ended=ended, running=None, iterations=Iterations())

    def _fill(self) -> None:
        free = self._engine.max_slots - self._engine.num_in_flight
        if free and self._queue:
            self._engine.submit([self._queue.popleft() for _ in range(min(free, len(self._queue)))])

    def _receive(self, deltas: Sequence[Delta]) -> list[Delta]:
        ended = []
        for delta in deltas:
            parts = self._tokens[delta.request_id]
            parts.append(delta)
            if delta.finish_reason:
                ended.append(_joined(delta.request_id, parts, delta.finish_reason))
                for held in (self._tokens, self._reported, self._numbers):
                    del held[delta.request_id]
        return ended

    def _block(self) -> TokenBlock | None:
        new = [(name, parts[self._reported[name] :]) for name, parts in self._tokens.items()]
        new = [(name, parts) for name, parts in new if parts]
        if not new:
            return None
        for name, _ in new:
            self._reported[name] = len(self._tokens[name])
        return TokenBlock(
            numbers=np.array([self._numbers[name] for name, _ in new], np.int32),
            lengths=np.array([sum(len(d.token_ids) for d in parts) for _, parts in new], np.int32),
            token_ids=np.concatenate([d.token_ids for _, parts in new for d in parts]),
            logprobs=np.concatenate([d.logprobs for _, parts in new for d in parts]),
        )


@dataclass(slots=True)
class _Replica:
    """What the controller knows about one replica."""

    slots: int
    reserve: int
    room: int  # slots + reserve - requests held
    held: dict[str, int] = field(
        default_factory=dict
    )  # request id: its number (see TokenBlock), in order of submission
    num_numbered: int = 0  # requests sent, plus those in the outbox
    outbox: list[Request] = field(default_factory=list)
    under_way: int = 0  # exchanges
    blocks: list[TokenBlock] = field(default_factory=list)  # of this step
    lost: str | None = None

    def forget_requests(self) -> None:
        self.num_numbered -= len(self.outbox)  # never sent
        self.outbox.clear()
        self.held.clear()
        self.blocks.clear()
        self.under_way = 0
        self.room = self.slots + self.reserve


class ReplicaEngine:
    """See the module docstring and :class:`rlpost.engine.protocol.Engine`. One owner, one thread.

    Args:
        replicas: the transport.
        reserve_share: requests a replica holds beyond its slots, over its slots.
    """

    def __init__(self, replicas: Replicas, *, reserve_share: float = 0.25) -> None:
        self._transport = replicas
        self.kv_capacity: KVCapacity | None = None
        reserves = [int(np.ceil(slots * reserve_share)) for slots in replicas.slots]
        self._replicas = [_Replica(s, r, s + r) for s, r in zip(replicas.slots, reserves, strict=True)]
        self._num_held = 0  # requests, over all replicas
        self._roomiest = [(-r.room, n) for n, r in enumerate(self._replicas)]  # heap with stale entries
        heapq.heapify(self._roomiest)
        self._to_send: set[int] = set()
        self._most_held = 0  # requests at once since the last abort, or loss of a replica
        self._count_capacity()
        self._under_way = 0

    def _count_capacity(self) -> None:
        self._most_held = 0
        alive = [r for r in self._replicas if r.lost is None]
        self.max_slots = sum(r.slots for r in alive)
        self.reserve = sum(r.reserve for r in alive)

    @property
    def losses(self) -> list[Loss]:
        return [Loss(replica=n, reason=r.lost) for n, r in enumerate(self._replicas) if r.lost is not None]

    # ---- generation

    def submit(self, requests: Sequence[Request]) -> Sequence[int]:
        """Each request goes to the replica with the most room at that moment; it is sent with the next step."""
        return [self._place(request) for request in requests]

    def step(self) -> EngineStep:
        """Send the waiting requests, then process the available reports, at least one.

        Raises WorkerLost if no replica is left.
        """
        if not self.max_slots:
            raise WorkerLost("; ".join(loss.reason for loss in self.losses))
        if not self._num_held:
            return NOTHING
        self._send()
        assert self._under_way, "requests are held, but no exchange is outstanding"
        started = self._transport.now()
        reports = self._transport.wait()
        return self._take_in(reports, started)

    def abort_all(self) -> EngineStep:
        """Also interrupts running exchanges; a replica that does not stop within the transport's deadline is lost."""
        busy = [n for n, r in enumerate(self._replicas) if r.lost is None and (r.held or r.under_way)]
        started = self._transport.now()
        reports = self._transport.stop(busy) if busy else ()
        result = self._take_in(reports, started)
        # Requests still held were never sent: sent ones came back with a last report or with their lost replica.
        unsent = [Delta(i, _NO_TOKENS, _NO_LOGPROBS) for replica in self._replicas for i in replica.held]
        for replica in self._replicas:
            replica.forget_requests()
        self._num_held = self._under_way = self._most_held = 0
        self._to_send.clear()
        self._roomiest = [(-r.room, n) for n, r in enumerate(self._replicas) if r.lost is None]
        heapq.heapify(self._roomiest)
        return EngineStep(
            deltas=[*result.deltas, *result.returned, *unsent],
            duration_s=result.duration_s,
            num_running=0,
            num_prefill_tokens=result.num_prefill_tokens,
            iterations=result.iterations,
        )

    def pause_all(self) -> EngineStep:
        """Keeps nothing: which replica a sample resumes on is not known before the next step."""
        return self.abort_all()

    def resume(self) -> Sequence[str]:
        return ()

    @property
    def num_in_flight(self) -> int:
        return self._num_held

    def now(self) -> float:
        return self._transport.now()

    # ---- private

    def _place(self, request: Request) -> int:
        while True:
            room, n = self._roomiest[0]
            replica = self._replicas[n]
            if -room == replica.room and replica.lost is None:
                break
            heapq.heappop(self._roomiest)
        assert replica.room > 0, "the caller keeps num_in_flight <= max_slots + reserve"
        replica.held[request.request_id] = replica.num_numbered
        replica.num_numbered += 1
        replica.outbox.append(request)
        replica.room -= 1
        self._num_held += 1
        heapq.heapreplace(self._roomiest, (-replica.room, n))
        self._to_send.add(n)
        return n

    def _send(self) -> None:
        """Keep two exchanges outstanding with every replica that holds something.

        The caller fills the engine up to a limit of its own. Holding fewer requests than before can only mean that
        nothing is left to submit, so an early report would get no new requests.
        """
        self._most_held = max(self._most_held, self._num_held)
        has_more = self._num_held == self._most_held
        exchanges = []
        for n in self._to_send:
            replica = self._replicas[n]
            while replica.lost is None and replica.held and replica.under_way < IN_FLIGHT:
                requests, replica.outbox = replica.outbox, []
                replica.under_way += 1
                self._under_way += 1
                exchanges.append((n, Exchange(requests=requests, has_more=has_more)))
        self._to_send.clear()
        if exchanges:
            self._transport.send(exchanges)

    def _take_in(self, reports: Iterable[Report | Loss], started: float) -> EngineStep:
        ended: list[Delta] = []
        returned: list[Delta] = []
        iterations: list[Iterations] = []
        for report in reports:
            n = report.replica
            replica = self._replicas[n]
            if isinstance(report, Loss):
                returned += self._lose(n, report.reason)
                continue
            replica.under_way -= 1
            self._under_way -= 1
            for request_id, *_ in report.ended:
                del replica.held[request_id]
            replica.room += len(report.ended)
            self._num_held -= len(report.ended)
            ended += report.ended
            if report.running is not None:
                replica.blocks.append(report.running)
            iterations.append(report.iterations)
            heapq.heappush(self._roomiest, (-replica.room, n))
            self._to_send.add(n)
        return EngineStep(
            deltas=ended,
            duration_s=self._transport.now() - started,
            num_running=self._num_held,
            num_prefill_tokens=sum([one.num_prefilled for one in iterations]),
            iterations=iterations,
            returned=returned,
        )

    def _lose(self, n: int, reason: str) -> list[Delta]:
        """Remove a replica; returns its samples with the tokens it has reported."""
        replica = self._replicas[n]
        if replica.lost is not None:
            return []
        replica.lost = reason
        self._under_way -= replica.under_way
        tokens: dict[str, list[Delta]] = {request_id: [] for request_id in replica.held}
        names = {number: request_id for request_id, number in replica.held.items()}
        for block in replica.blocks:
            bounds = np.cumsum(block.lengths)
            for number, end, length in zip(block.numbers.tolist(), bounds, block.lengths, strict=True):
                if number in names:
                    part = slice(end - length, end)
                    tokens[names[number]].append(Delta(names[number], block.token_ids[part], block.logprobs[part]))
        self._num_held -= len(replica.held)
        replica.forget_requests()
        self._count_capacity()
        return [_joined(request_id, parts, "") for request_id, parts in tokens.items()]


_NO_TOKENS, _NO_LOGPROBS = np.zeros(0, np.int32), np.zeros(0, np.float32)


def _joined(request_id: str, parts: Sequence[Delta], finish_reason: str) -> Delta:
    return Delta(
        request_id=request_id,
        token_ids=np.concatenate([_NO_TOKENS, *(d.token_ids for d in parts)]),
        logprobs=np.concatenate([_NO_LOGPROBS, *(d.logprobs for d in parts)]),
        finish_reason=finish_reason,
    )

"""Replicas without a model on one virtual clock: the transport behind ``ReplicaEngine``, for scale tests and planning.

Implements ``engine.replicas.Replicas``, and does what ``ReplicaLoop`` does with a real engine: fill free slots from the
queue, decode, reply to an exchange when its time is over. The clock jumps from event to event (a sample finishes, an
exchange ends, a stop arrives), never token by token, so the controller's own cost can be measured with thousands of
replicas. All tokens are views of one shared array; a sample's length comes from ``length_of``. Iterations are reported
one by one, as an engine would report them.

The time of one iteration with r running samples and p prefilled tokens is ``base_s + sample_s * r + prefill_s * p``.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlpost.engine.protocol import Delta, Iterations, Request
from rlpost.engine.replicas import EARLY_REPORT_SHARE, Exchange, Loss, Report, TokenBlock, gather_s
from rlpost.simulation.engine import StepCost

ROUNDING_S = 1e-9  # an exchange that is over up to a rounding error is over


@dataclass(slots=True)
class _Running:
    """A sample that holds a slot. Iterations are counted over the replica's lifetime."""

    request_id: str
    started: int  # iterations before its first
    finish_reason: str


@dataclass(slots=True)
class _Replica:
    """One simulated engine with its loop."""

    slots: int
    clock_s: float = 0.0
    iteration: int = 0
    prefill: int = 0  # tokens to compute in the next iteration
    queue: deque[Request] = field(default_factory=deque)
    num_taken: int = 0  # requests ever taken, without those in the queue
    running: dict[int, _Running] = field(default_factory=dict)  # by number (see TokenBlock), in the order started
    finishes: list[tuple[int, int]] = field(default_factory=list)  # heap: iteration, number
    inbox: deque[Exchange] = field(default_factory=deque)  # including the running one
    # of the running exchange
    started_s: float = 0.0
    first_iteration: int = 0
    num_started: int = 0  # samples; the newest of ``running``
    ended: list[Delta] = field(default_factory=list)
    iterations: Iterations = field(default_factory=Iterations)
    jump: int = 0  # iterations to the next event
    jump_started_s: float = 0.0

    @property
    def may_report_early(self) -> bool:
        return self.inbox[0].has_more and not self.queue and len(self.running) < self.slots


class SimulatedReplicas:
    """See the module docstring. Exchanges arrive, and reports are read, instantly.

    Args:
        slots: per replica: samples it decodes at once.
        length_of: total response length of a request id, in tokens, over all its resumptions.
        max_response_tokens: what a request's ``max_new_tokens`` counts down from; lengths are cut there.
        cost: seconds per iteration.
        exchange_s: duration of an exchange in seconds.
    """

    def __init__(
        self,
        slots: Sequence[int],
        *,
        length_of: Callable[[str], int],
        max_response_tokens: int,
        cost: StepCost,
        exchange_s: float,
    ) -> None:
        self.slots: Sequence[int] = list(slots)
        self._replicas = [_Replica(s) for s in slots]
        self._length_of, self._limit = length_of, max_response_tokens
        self._cost, self._exchange_s = cost, exchange_s
        self._gather_s = gather_s(len(slots), exchange_s)
        self._events: list[tuple[float, int]] = []  # heap: when a replica's jump ends; one entry per busy replica
        self._clock_s = 0.0
        longest_block = max(max_response_tokens, max(slots) * self._most_iterations())
        self._tokens = np.zeros(longest_block, np.int32)
        self._logprobs = np.full(longest_block, -1.0, np.float32)

    # ---- the protocol ----------------------------------------------------------------------------------------

    def send(self, exchanges: Sequence[tuple[int, Exchange]]) -> None:
        for replica, exchange in exchanges:
            one = self._replicas[replica]
            one.inbox.append(exchange)
            if len(one.inbox) == 1:
                one.clock_s = max(one.clock_s, self._clock_s)
                self._begin(replica)

    def wait(self) -> Sequence[Report | Loss]:
        """The next report, and everything else that arrives while reports are gathered."""
        reports: list[Report | Loss] = []
        until_s = math.inf
        while self._events and self._events[0][0] <= until_s:
            self._clock_s, n = heapq.heappop(self._events)
            report = self._next_event(n)
            if report is not None:
                reports.append(report)
                until_s = min(until_s, self._clock_s + self._gather_s)
        assert reports, "wait() without an outstanding exchange would wait forever"
        if self._events:
            self._clock_s = until_s
        return reports

    def stop(self, replicas: Sequence[int]) -> Sequence[Report | Loss]:
        """Every replica finishes its current iteration, then hands over what it holds."""
        reports: list[Report | Loss] = []
        now_s = self._clock_s
        stopped = set(replicas)
        self._events = [event for event in self._events if event[1] not in stopped]
        heapq.heapify(self._events)
        for n in replicas:
            one = self._replicas[n]
            if one.inbox:
                self._decode(one, self._iterations_until(one, now_s))
                reports.append(self._reply(n))
            while one.inbox:  # never started
                one.queue.extend(one.inbox[0].requests)
                reports.append(self._reply(n))
            reports.append(Report(replica=n, ended=self._unfinished(one), running=None, iterations=Iterations()))
            self._clock_s = max(self._clock_s, one.clock_s)
        return reports

    def now(self) -> float:
        return self._clock_s

    # ---- one replica -----------------------------------------------------------------------------------------

    def _begin(self, n: int) -> None:
        """Start the oldest exchange in the inbox."""
        one = self._replicas[n]
        one.queue.extend(one.inbox[0].requests)
        one.started_s, one.first_iteration = one.clock_s, one.iteration
        self._plan(n)

    def _plan(self, n: int) -> None:
        """Fill the slots, then find the next event: a finish, or the exchange's end."""
        one = self._replicas[n]
        while one.queue and len(one.running) < one.slots:
            self._start(one, one.queue.popleft())
        one.jump_started_s = one.clock_s
        if not one.running:
            heapq.heappush(self._events, (one.clock_s, n))
            return
        left_s = one.started_s + self._limit_s(one) - one.clock_s - self._cost.prefill_s * one.prefill
        to_the_end = max(1, math.ceil((left_s - ROUNDING_S) / self._iteration_s(one)))
        one.jump = min(one.finishes[0][0] - one.iteration, to_the_end)
        heapq.heappush(self._events, (self._end_of(one, one.jump), n))

    def _next_event(self, n: int) -> Report | None:
        """A replica's jump ends; returns its report if that ends the exchange."""
        one = self._replicas[n]
        self._decode(one, one.jump)
        one.jump = 0
        is_over = one.clock_s - one.started_s >= self._limit_s(one) - ROUNDING_S
        if not is_over and (one.queue or one.running):
            self._plan(n)
            return None
        report = self._reply(n)
        if one.inbox:
            self._begin(n)
        return report

    def _start(self, one: _Replica, request: Request) -> None:
        so_far = self._limit - request.max_new_tokens
        total = self._length_of(request.request_id)
        reason = "stop" if total <= self._limit else "length"
        number = one.num_taken
        one.num_taken += 1
        one.running[number] = _Running(request.request_id, one.iteration, reason)
        remaining = max(1, min(total, self._limit) - so_far)
        heapq.heappush(one.finishes, (one.iteration + remaining, number))
        one.prefill += request.num_tokens
        one.num_started += 1

    def _decode(self, one: _Replica, num_iterations: int) -> None:
        """Advance by ``num_iterations``; no sample finishes before the last of them."""
        if num_iterations:
            one.clock_s = self._end_of(one, num_iterations)
            one.iteration += num_iterations
            each_s, running = self._iteration_s(one), len(one.running)
            one.iterations.add(each_s + self._cost.prefill_s * one.prefill, running, one.prefill)
            one.iterations.add(each_s, running, 0, times=num_iterations - 1)
            one.prefill = 0
        while one.finishes and one.finishes[0][0] == one.iteration:
            sample = one.running.pop(heapq.heappop(one.finishes)[1])
            one.ended.append(self._delta(sample.request_id, one.iteration - sample.started, sample.finish_reason))

    def _reply(self, n: int) -> Report:
        """The report of the exchange at the head of the inbox, which is over."""
        one = self._replicas[n]
        one.inbox.popleft()
        report = Report(replica=n, ended=one.ended, running=self._block(one), iterations=one.iterations)
        one.ended, one.iterations, one.num_started, one.jump = [], Iterations(), 0, 0
        one.first_iteration = one.iteration
        return report

    def _block(self, one: _Replica) -> TokenBlock | None:
        """The tokens that running samples got in this exchange; those started in it are the newest of ``running``."""
        num_iterations = one.iteration - one.first_iteration
        if not num_iterations or not one.running:
            return None
        lengths = np.full(len(one.running), num_iterations, np.int32)
        newest = zip(range(1, min(one.num_started, len(lengths)) + 1), reversed(one.running.values()), strict=False)
        for place, sample in newest:
            lengths[-place] = min(num_iterations, one.iteration - sample.started)
        size = int(lengths.sum())
        return TokenBlock(
            numbers=np.fromiter(one.running, np.int32, len(one.running)),
            lengths=lengths,
            token_ids=self._tokens[:size],
            logprobs=self._logprobs[:size],
        )

    def _unfinished(self, one: _Replica) -> list[Delta]:
        """All samples it holds, with all their tokens; the replica drops them."""
        deltas = [self._delta(s.request_id, one.iteration - s.started, "") for s in one.running.values()]
        deltas += [self._delta(request.request_id, 0, "") for request in one.queue]
        one.num_taken += len(one.queue)
        one.running.clear()
        one.queue.clear()
        one.finishes.clear()
        one.prefill = 0
        return deltas

    def _delta(self, request_id: str, num_tokens: int, finish_reason: str) -> Delta:
        tokens, logprobs = self._tokens[:num_tokens], self._logprobs[:num_tokens]
        return Delta(request_id=request_id, token_ids=tokens, logprobs=logprobs, finish_reason=finish_reason)

    # ---- time ------------------------------------------------------------------------------------------------

    def _iteration_s(self, one: _Replica) -> float:
        return self._cost.base_s + self._cost.sample_s * len(one.running)

    def _end_of(self, one: _Replica, num_iterations: int) -> float:
        """When the iterations that start with the jump's first one end."""
        return one.jump_started_s + num_iterations * self._iteration_s(one) + self._cost.prefill_s * one.prefill

    def _iterations_until(self, one: _Replica, now_s: float) -> int:
        """Iterations of the current jump that have started by now; the current one is always completed."""
        passed_s = now_s - one.jump_started_s - self._cost.prefill_s * one.prefill
        started = math.ceil((passed_s - ROUNDING_S) / self._iteration_s(one)) if one.running else 0
        return min(one.jump, max(started, min(1, one.jump)))

    def _limit_s(self, one: _Replica) -> float:
        return self._exchange_s * (EARLY_REPORT_SHARE if one.may_report_early else 1.0)

    def _most_iterations(self) -> int:
        """In one exchange; iterations are shortest with one running sample."""
        return math.ceil(self._exchange_s / (self._cost.base_s + self._cost.sample_s)) + 1

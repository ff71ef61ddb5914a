"""Reward functions in separate processes, each call with a deadline enforced by killing.

Owns the worker processes and one thread, the dispatcher, which alone touches them. Who waits for whom: the dispatcher
waits for workers, for new calls and for the nearest deadline; a caller never waits for it (:meth:`RewardWorkers.submit`
puts a call in a queue, and results arrive through the caller's callback, on the dispatcher's thread). So results arrive
while the run's main thread generates, updates or saves.

A worker has one call at a time, or up to ``concurrency`` calls of one async function. A call past its deadline ends its
worker and everything the worker started, and another worker replaces it. Async calls enforce their own deadline; if a
worker with several of them is killed or dies, each is repeated alone, so that only the culprit fails.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from rlpost.config import RewardConfig
from rlpost.errors import ConfigError, explain
from rlpost.rewards.child_signals import default_signals_in_children
from rlpost.rewards.functions import FunctionFacts, LoadedFunction, Question, Response
from rlpost.rewards.outcomes import Outcome
from rlpost.rewards.selection import list_models, to_plain_config
from rlpost.rewards.worker_main import encode_frame
from rlpost.rewards.worker_process import WorkerProcess

MAX_DEFAULT_WORKERS = 16
ASYNC_GRACE_S = 2.0  # async calls end themselves at their deadline; a stuck loop is killed this much later
CLOSE_GRACE_S = 3.0  # for a function's own close()
POLL_S = 0.5  # how soon a worker's death is noticed if its socket does not show it
MAX_FAILED_STARTS = 3  # in a row


class Call(NamedTuple):
    """One call of one function: on a response, or on all responses of a group."""

    function: int
    question: Question
    responses: tuple[Response, ...]


class CallResult(NamedTuple):
    outcomes: tuple[Outcome, ...]  # one for each response
    seconds: float


Deliver = Callable[[tuple[int, CallResult]], None]  # with the caller's number of the call


class Calls(Protocol):
    """Where reward functions are called: in this process or in workers."""

    facts: tuple[FunctionFacts, ...]

    def wait_ready(self) -> None:
        """Block until the functions are loaded. Raises ConfigError if they cannot be."""

    def submit(self, call: Call, number: int, deliver: Deliver) -> CallResult | None:
        """The result if it is available at once; otherwise ``deliver`` is called once, maybe on another thread."""

    def check(self) -> None:
        """Raises the error that broke the calling mechanism itself, if any."""

    def take_replaced(self) -> int:
        """Workers killed or lost since the last call."""

    def close(self) -> None: ...


class InlineCalls:
    """Calls at submission, in this process and without a deadline for sync code."""

    def __init__(self, functions: list[LoadedFunction]) -> None:
        self._functions = functions
        self.facts = tuple(function.facts for function in functions)

    def wait_ready(self) -> None:
        return None

    def submit(self, call: Call, number: int, deliver: Deliver) -> CallResult:
        started = time.perf_counter()
        with default_signals_in_children():
            outcomes = self._functions[call.function].score(call.question, call.responses)
        return CallResult(outcomes=tuple(outcomes), seconds=time.perf_counter() - started)

    def check(self) -> None:
        return None

    def take_replaced(self) -> int:
        return 0

    def close(self) -> None:
        for function in self._functions:
            function.close()


def choose_num_workers(cfg: RewardConfig) -> int:
    """``reward.workers``; or one where each would load a model; or one for each core this process may use, up to a
    limit."""
    return cfg.workers or (1 if list_models(cfg) else min(MAX_DEFAULT_WORKERS, len(os.sched_getaffinity(0))))


@dataclass(eq=False, slots=True)
class _Job:
    number: int
    call: Call
    frame: bytes  # the call as sent to the worker
    caller_number: int
    deliver: Deliver
    alone: bool = False  # it was in a worker that died with other calls in it
    started_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Worker:
    process: WorkerProcess
    started_s: float
    ready: bool = False
    jobs: dict[int, _Job] = field(default_factory=dict)  # by number


class RewardWorkers:
    """See the module docstring. Workers start at once; :meth:`wait_ready` tells whether they can be used.

    Args:
        reference_key: the reference's column.
        num_workers: processes; None: :func:`choose_num_workers`.
        folder: the run's, for what functions keep (``use_folder``); None: one that ends with the workers. A function
            that keeps something creates it.
    """

    def __init__(
        self,
        cfg: RewardConfig,
        reference_key: str | None = None,
        *,
        num_workers: int | None = None,
        folder: Path | None = None,
    ) -> None:
        self.facts: tuple[FunctionFacts, ...] = ()
        self._cfg = cfg
        self._num_workers = num_workers or choose_num_workers(cfg)
        self._own_folder: Path | None = None
        if folder is None:
            folder = self._own_folder = Path(tempfile.gettempdir(), f"rlpost-rewards-{uuid.uuid4().hex}")
        self._setup = {
            "path": sys.path[:],
            "reward": to_plain_config(cfg),
            "reference_key": reference_key,
            "folder": str(folder.absolute()),
        }
        self._environment = dict(os.environ)  # for replacements, whatever the run writes there later
        self._inbox: SimpleQueue[_Job] = SimpleQueue()
        self._numbers = 0
        self._replaced = 0
        self._workers: list[_Worker] = []
        self._queues: dict[int, deque[_Job]] = {}
        self._failed_starts = 0
        self._broken: str | None = None  # why no worker is available
        self._error: BaseException | None = None  # a bug in the dispatcher
        self._ready = threading.Event()
        self._closing = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="reward-workers", daemon=True)
        self._thread.start()

    # ---- the caller's side -----------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Block until a worker has loaded every function. Raises ConfigError with the reason if none can."""
        if not self._ready.wait(self._cfg.start_timeout_s + 5):
            raise RuntimeError("reward workers: the dispatcher is not responding")
        self.check()
        if self._broken is not None:
            raise ConfigError(self._broken)

    def submit(self, call: Call, number: int, deliver: Deliver) -> None:
        """Queue a call; ``deliver`` is called exactly once, on another thread, whatever happens to the call."""
        assert not self._closing, "the workers were closed"
        self._numbers += 1
        question, responses = call.question._asdict(), [response._asdict() for response in call.responses]
        frame = encode_frame(
            {"number": self._numbers, "function": call.function, "question": question, "responses": responses}
        )
        self._inbox.put(_Job(self._numbers, call, frame, number, deliver))
        self._wake()

    def check(self) -> None:
        if self._error is not None:
            raise RuntimeError("reward workers: the dispatcher failed") from self._error

    def take_replaced(self) -> int:
        count, self._replaced = self._replaced, 0
        return count

    def close(self) -> None:
        """End all workers and the thread; undelivered results are dropped. Safe to call twice."""
        if not self._closing:
            self._closing = True
            self._wake()
            self._thread.join()
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            if self._own_folder is not None:
                shutil.rmtree(self._own_folder, ignore_errors=True)  # mostly, nothing ever created it

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe wakes it, too
            os.write(self._wake_write, b".")

    # ---- the dispatcher --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._take_in()
                self._replace_missing()
                self._assign()
                self._poll_sockets()
                self._enforce_deadlines()
        except BaseException as error:  # noqa: BLE001 - passed to the caller by check()
            self._error = error
        finally:
            self._end_workers()
            self._ready.set()

    def _take_in(self) -> None:
        while not self._inbox.empty():
            job = self._inbox.get()
            self._queues.setdefault(job.call.function, deque()).append(job)

    def _replace_missing(self) -> None:
        while self._broken is None and len(self._workers) < self._num_workers:
            worker = _Worker(WorkerProcess(self._setup, self._environment), time.monotonic())
            self._workers.append(worker)
            self._selector.register(worker.process.socket, selectors.EVENT_READ, worker)

    def _assign(self) -> None:
        if self._broken is not None:
            for queue in self._queues.values():
                while queue:
                    self._fail(queue.popleft(), f"crash: {self._broken}")
            return
        for worker in self._workers:
            while worker.ready and (job := self._next_for(worker)) is not None:
                job.started_s = time.monotonic()
                worker.jobs[job.number] = job
                worker.process.send(job.frame)

    def _next_for(self, worker: _Worker) -> _Job | None:
        """The oldest call that this worker may take now, removed from its queue."""
        if not worker.jobs:
            waiting = [queue for queue in self._queues.values() if queue]
            return min(waiting, key=lambda queue: queue[0].number).popleft() if waiting else None
        running = next(iter(worker.jobs.values()))
        queue = self._queues.get(running.call.function)
        room = self.facts[running.call.function].concurrency - len(worker.jobs)
        if queue and room > 0 and not running.alone and not queue[0].alone:
            return queue.popleft()
        return None

    def _poll_sockets(self) -> None:
        for worker in self._workers:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.process.has_unsent else 0)
            self._selector.modify(worker.process.socket, events, worker)
        busy = any(worker.jobs or not worker.ready for worker in self._workers)
        for key, events in self._selector.select(self._until_deadline() if busy else None):
            if key.data is None:
                os.read(self._wake_read, 1 << 16)
                continue
            if events & selectors.EVENT_WRITE:
                key.data.process.flush()
            if events & selectors.EVENT_READ:
                self._receive(key.data)
        if busy:
            for worker in [w for w in self._workers if w.process.has_died()]:
                self._receive(worker)
                if worker in self._workers:
                    self._lose(worker)

    def _receive(self, worker: _Worker) -> None:
        messages, alive = worker.process.receive()
        for message in messages:
            if not self._read_message(worker, message):
                alive = False
                break
        if not alive and worker in self._workers:
            self._lose(worker)

    def _read_message(self, worker: _Worker, message: Any) -> bool:
        """Process one message; False for anything that our own workers never send."""
        match message:
            case {"broken": str(reason)} if not worker.ready:
                self._remove(worker)
                self._count_failed_start(reason)
            case {"ready": list(facts)} if not worker.ready:
                worker.ready, self._failed_starts = True, 0
                self.facts = tuple(FunctionFacts(**{**one, "columns": tuple(one["columns"])}) for one in facts)
                self._ready.set()
            case {"number": int(number), "outcomes": list(outcomes)} if number in worker.jobs:
                job = worker.jobs[number]
                read = [_read_outcome(one) for one in outcomes]
                if len(read) != len(job.call.responses) or None in read:
                    return False
                del worker.jobs[number]
                seconds = time.monotonic() - job.started_s
                result = CallResult(outcomes=tuple(o for o in read if o is not None), seconds=seconds)
                job.deliver((job.caller_number, result))
            case _:
                return False
        return True

    def _count_failed_start(self, reason: str) -> None:
        """A worker could not load the functions: assume that none can, unless one did before."""
        self._failed_starts += 1
        if self._failed_starts >= MAX_FAILED_STARTS or not self._ready.is_set():
            self._broken = reason
            self._ready.set()

    def _lose(self, worker: _Worker) -> None:
        """Handle a worker that died or sent something invalid."""
        how = self._remove(worker)
        if not worker.ready:
            do = "see its messages above"
            self._count_failed_start(explain("reward worker", how, "a process that loads the reward", do))
            return
        self._fail_or_repeat(worker, f"crash: the reward's process ended during the call ({how})")

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if not worker.ready:
                if now > worker.started_s + self._cfg.start_timeout_s:
                    limit = f"{self._cfg.start_timeout_s:g} s"
                    do = "raise reward.start_timeout_s, or load less"
                    self._remove(worker)
                    self._count_failed_start(explain("reward worker", f"not ready after {limit}", "ready before", do))
                continue
            if not any(now > self._deadline(job) for job in worker.jobs.values()):
                continue
            self._remove(worker)
            timeout_s = self.facts[next(iter(worker.jobs.values())).call.function].timeout_s
            self._fail_or_repeat(worker, f"timeout: no result within {timeout_s:g} s")

    def _until_deadline(self) -> float:
        now = time.monotonic()
        jobs = [job for worker in self._workers for job in worker.jobs.values()]
        nearest = min((self._deadline(job) for job in jobs), default=now + POLL_S)
        return max(0.0, min(POLL_S, nearest - now + 0.001))

    def _deadline(self, job: _Job) -> float:
        facts = self.facts[job.call.function]
        return job.started_s + facts.timeout_s + (ASYNC_GRACE_S if facts.is_async else 0.0)

    def _fail_or_repeat(self, worker: _Worker, failure: str) -> None:
        """The call of a worker that is gone failed; if it had several, repeat each alone to find the culprit."""
        jobs = sorted(worker.jobs.values(), key=lambda job: job.number)
        if len(jobs) == 1:
            self._fail(jobs[0], failure)
            return
        for job in reversed(jobs):
            job.alone = True
            self._queues.setdefault(job.call.function, deque()).appendleft(job)

    def _fail(self, job: _Job, failure: str) -> None:
        seconds = time.monotonic() - job.started_s if job.started_s else 0.0
        outcomes = (Outcome(failure=failure),) * len(job.call.responses)
        job.deliver((job.caller_number, CallResult(outcomes=outcomes, seconds=seconds)))

    def _remove(self, worker: _Worker) -> str:
        """Kill a worker and let another replace it. Returns how it ended."""
        self._workers.remove(worker)
        self._selector.unregister(worker.process.socket)
        self._replaced += 1
        return worker.process.kill()

    def _end_workers(self) -> None:
        """Idle workers may close what they hold; afterwards all are gone."""
        idle = [worker for worker in self._workers if worker.ready and not worker.jobs]
        for worker in self._workers:
            if worker in idle:
                worker.process.hang_up()
            else:
                worker.process.kill()
        patience = time.monotonic() + CLOSE_GRACE_S
        while time.monotonic() < patience and not all(worker.process.has_died() for worker in idle):
            time.sleep(0.01)
        for worker in idle:
            worker.process.kill()
        self._workers = []


def _read_outcome(value: Any) -> Outcome | None:
    """An outcome as written by a worker; None for anything else."""
    match value:
        case {"reward": None, "parts": {}, "failure": None | str() as failure}:
            return Outcome(failure=failure)
        case {"reward": float() | int() as reward, "parts": dict(parts), "failure": None}:
            if all(isinstance(number, float | int) and math.isfinite(number) for number in (reward, *parts.values())):
                return Outcome(reward=float(reward), parts={name: float(part) for name, part in parts.items()})
    return None

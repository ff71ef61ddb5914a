"""One engine on several devices: its members, one process each, do the same calls in the same order with the same data.

vLLM schedules and samples in every member by itself and exchanges activations inside a step, so members that differ by
one request, seed or abort compute with batches that do not belong together. :class:`LockstepEngine` stands before each
member's engine. The *leader* (the lowest rank) is the only one that hears of requests: its ``submit``, ``step`` and
``abort_all`` are commands, which the others carry out in :meth:`LockstepEngine.follow`. What every member's process is
told anyway (sleep, wake, load weights, score) each calls itself, and the calls must coincide.

Before each call, and again when a batch is scheduled and not yet computed, the members *meet*: they lay side by side
which call they are at, how many calls and engine steps came before, how many requests are in flight, the batch, and a
checksum of all that went in and came out since the start. A difference ends the run at every member, with the same
message; nothing is computed from a batch that is not the same everywhere.

Who waits for whom: every meeting waits for all members. A member that dies closes its connections, and the others'
meeting fails; one that hangs is the controller's to kill (``workers.cluster.actors``). Built by
``workers.local.start_worker``.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from rlpost.engine.protocol import WAKE_TAGS, DeviceEngine, EngineStep, Request
from rlpost.errors import RunError, explain

CALLS = ("follow", "submit", "step", "abort_all", "end", "batch", "score", "load_weights", "sleep", "wake")
COMMANDS = ("submit", "step", "abort_all", "end")  # the leader's, to members that follow
# What a meeting compares, in the order in which a difference is reported.
FIELDS = (
    "call",
    "calls so far",
    "engine steps so far",
    "requests in flight",
    "samples in the batch",
    "tokens in the batch",
    "checksum of what went in and came out",
    "bytes that the leader sends",  # not compared
)


class Members(Protocol):
    """The way from one member to the others; all members make the same calls."""

    rank: int  # of this one in its engine; 0 leads
    names: Sequence[str]  # of all, for messages

    def gather(self, row: np.ndarray) -> np.ndarray:
        """Every member's ``row``, i64[fields], as i64[members, fields]."""

    def share(self, payload: bytes, num_bytes: int) -> bytes:
        """The leader's ``payload``, which has ``num_bytes``; the others pass an empty one."""


class LockstepEngine:
    """Implements ``engine.protocol.DeviceEngine`` for one member; see the module docstring.

    Args:
        engine: this member's own.
        members: the others.
    """

    def __init__(self, engine: DeviceEngine, members: Members) -> None:
        self._engine, self._members = engine, members
        self.max_slots, self.reserve, self.kv_capacity = engine.max_slots, engine.reserve, engine.kv_capacity
        self._num_calls = self._num_steps = 0
        self._checksum = 0

    # ---- commands: the leader's to give, in an order of its own

    def submit(self, requests: Sequence[Request]) -> Sequence[int]:
        self._lead("submit", pickle.dumps(list(requests)))
        return self._engine.submit(requests)

    def step(self) -> EngineStep:
        self._lead("step")
        return self._step()

    def abort_all(self) -> EngineStep:
        self._lead("abort_all")
        return self._noted(self._engine.abort_all())

    def pause_all(self) -> EngineStep:
        return self.abort_all()  # a replica of a cluster: its samples may go on at another one

    def resume(self) -> Sequence[str]:
        return ()

    def end(self) -> None:
        """Let the others return from :meth:`follow`; the result of the last step has been compared then."""
        self._lead("end")

    def follow(self, beat: Callable[[], None]) -> None:
        """Do what the leader does until it ends. ``beat`` is called for each command.

        Raises RunError where the members differ, and whatever the leader's call raises here as it does there.
        """
        assert self._members.rank > 0, "the leader does not follow"
        while True:
            beat()
            command, payload = self._hear()
            if command == "submit":
                self._engine.submit(pickle.loads(payload))  # noqa: S301 -- from the leader, another process of this run
            elif command == "step":
                self._step()
            elif command == "abort_all":
                self._noted(self._engine.abort_all())
            else:
                return

    @property
    def num_in_flight(self) -> int:
        return self._engine.num_in_flight

    def now(self) -> float:
        return self._engine.now()

    # ---- calls that each member makes by itself

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        for sequence in sequences:
            self._note(np.ascontiguousarray(sequence, np.int64).tobytes())
        self._meet("score")
        return self._engine.score(sequences)

    def load_weights(self, buckets: Iterable[Sequence[tuple[str, Any]]]) -> None:
        """Every member is given whole tensors and keeps its part."""
        self._meet("load_weights")
        self._engine.load_weights(buckets)

    def read_weight(self, name: str) -> Any:
        return self._engine.read_weight(name)

    def part_of_weight(self, name: str, tensor: Any) -> Any:
        return self._engine.part_of_weight(name, tensor)

    def sleep(self) -> None:
        self._meet("sleep")
        self._engine.sleep()

    def wake(self, tags: Sequence[str] = WAKE_TAGS) -> None:
        self._note(" ".join(tags).encode())
        self._meet("wake")
        self._engine.wake(tags)

    def shutdown(self) -> None:
        self._engine.shutdown()

    def agree_on_batch(self, num_tokens: np.ndarray) -> None:
        """The engine has scheduled a batch and asks before it computes it. ``num_tokens``: i64[samples], of each."""
        if len(num_tokens):
            self._note(num_tokens.tobytes())
            self._meet("batch", num_samples=len(num_tokens), num_tokens=int(num_tokens.sum()))

    # ---- meetings

    def _lead(self, command: str, payload: bytes = b"") -> None:
        assert self._members.rank == 0, f"{command} is the leader's to call"
        self._meet(command, payload=payload)
        if payload:
            self._members.share(payload, len(payload))
            self._note(payload)

    def _hear(self) -> tuple[str, bytes]:
        leader = self._meet("follow")
        num_bytes = int(leader[-1])
        payload = self._members.share(b"", num_bytes) if num_bytes else b""
        if payload:
            self._note(payload)
        return CALLS[leader[0]], payload

    def _meet(self, call: str, *, num_samples: int = 0, num_tokens: int = 0, payload: bytes = b"") -> np.ndarray:
        """The leader's row. Raises RunError, at every member, where one differs from the leader."""
        in_flight = self._engine.num_in_flight
        counts = (self._num_calls, self._num_steps, in_flight, num_samples, num_tokens)
        row = np.array([CALLS.index(call), *counts, self._checksum, len(payload)], np.int64)
        rows = self._members.gather(row)
        for name, other in zip(self._members.names[1:], rows[1:], strict=True):
            _require_same(self._members.names[0], rows[0], name, other)
        self._num_calls += 1
        return rows[0]

    def _step(self) -> EngineStep:
        result = self._noted(self._engine.step())
        self._num_steps += 1
        return result

    def _noted(self, result: EngineStep) -> EngineStep:
        """Tokens, not logprobs: kernels may differ in a last bit, and members part ways only where a token does."""
        for delta in result.deltas:
            self._note(f"{delta.request_id} {delta.finish_reason}".encode())
            self._note(delta.token_ids.tobytes())
        return result

    def _note(self, data: bytes) -> None:
        self._checksum = zlib.crc32(data, self._checksum)


def _require_same(leader_name: str, leader: np.ndarray, name: str, other: np.ndarray) -> None:
    for number, field in enumerate(FIELDS[:-1]):
        here, there = int(other[number]), int(leader[number])
        if field == "call":
            if here == there or (CALLS[here] == "follow" and CALLS[there] in COMMANDS):
                continue
            theirs, ours = CALLS[there], CALLS[here]
        elif here == there:
            continue
        else:
            theirs, ours = str(there), str(here)
        raise RunError(
            explain(
                f"members of one engine: {field} of {name}, at engine step {int(leader[2])}",
                ours,
                f"{theirs}, as {leader_name} has it",
                "nothing was computed from it; the run can be resumed, and if it comes again, please report it",
            )
        )

"""One engine on several devices: its members, one process each, make the same calls in the same order on the same data.

vLLM schedules and samples in every member independently and exchanges activations within a step, so members that differ
by one request, seed or abort would compute on mismatched batches. :class:`LockstepEngine` wraps each member's engine.
Only the *leader* (the lowest rank) receives requests: its ``submit``, ``step`` and ``abort_all`` are commands, which
the others carry out in :meth:`LockstepEngine.follow`. Calls that reach every member's process anyway (sleep, wake, load
weights, score) are made by each member itself, and must coincide.

Before each call, and again when a batch is scheduled but not yet computed, the members *synchronize*: they compare
which call they are making, how many calls and engine steps came before, how many requests are in flight, the batch, and
a checksum of all inputs and outputs since the start. A difference ends the run at every member, with the same message;
nothing is computed from a batch that is not the same everywhere.

Who waits for whom: every synchronization waits for all members. A member that dies closes its connections, and the
others' synchronization fails; one that hangs is killed by the controller (``workers.cluster.actors``). Built by
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
COMMANDS = ("submit", "step", "abort_all", "end")  # from the leader to the members that follow
# What a synchronization compares, in the order in which a difference is reported.
FIELDS = (
    "call",
    "calls so far",
    "engine steps so far",
    "requests in flight",
    "samples in the batch",
    "tokens in the batch",
    "checksum of inputs and outputs",
    "bytes that the leader sends",  # not compared
)


class Members(Protocol):
    """The connection from one member to the others; all members make the same calls."""

    rank: int  # of this member in its engine; 0 leads
    names: Sequence[str]  # of all members, for messages

    def gather(self, row: np.ndarray) -> np.ndarray:
        """Every member's ``row``, i64[fields], as i64[members, fields]."""

    def share(self, payload: bytes, num_bytes: int) -> bytes:
        """The leader's ``payload`` of ``num_bytes``; the others pass an empty one."""


class LockstepEngine:
    """Implements ``engine.protocol.DeviceEngine`` for one member; see the module docstring.

    Args:
        engine: this member's own engine.
        members: the other members.
    """

    def __init__(self, engine: DeviceEngine, members: Members) -> None:
        self._engine, self._members = engine, members
        self.max_slots, self.reserve, self.kv_capacity = engine.max_slots, engine.reserve, engine.kv_capacity
        self._num_calls = self._num_steps = 0
        self._checksum = 0

    # ---- commands: given by the leader alone, in any order

    def submit(self, requests: Sequence[Request]) -> Sequence[int]:
        self._lead("submit", pickle.dumps(list(requests)))
        return self._engine.submit(requests)

    def step(self) -> EngineStep:
        self._lead("step")
        return self._step()

    def abort_all(self) -> EngineStep:
        self._lead("abort_all")
        return self._with_checksum(self._engine.abort_all())

    def pause_all(self) -> EngineStep:
        return self.abort_all()  # a replica of a cluster: its samples may resume on another one

    def resume(self) -> Sequence[str]:
        return ()

    def end(self) -> None:
        """Let the others return from :meth:`follow`; by then the last step's result has been compared."""
        self._lead("end")

    def follow(self, beat: Callable[[], None]) -> None:
        """Do what the leader does until it calls :meth:`end`. ``beat`` is called for each command.

        Raises RunError if the members differ, and whatever the leader's call raises.
        """
        assert self._members.rank > 0, "the leader does not follow"
        while True:
            beat()
            command, payload = self._receive()
            if command == "submit":
                self._engine.submit(pickle.loads(payload))  # noqa: S301 -- from the leader, another process of this run
            elif command == "step":
                self._step()
            elif command == "abort_all":
                self._with_checksum(self._engine.abort_all())
            else:
                return

    @property
    def num_in_flight(self) -> int:
        return self._engine.num_in_flight

    def now(self) -> float:
        return self._engine.now()

    # ---- calls that each member makes itself

    def score(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        for sequence in sequences:
            self._add_to_checksum(np.ascontiguousarray(sequence, np.int64).tobytes())
        self._sync("score")
        return self._engine.score(sequences)

    def load_weights(self, buckets: Iterable[Sequence[tuple[str, Any]]]) -> None:
        """Every member is given whole tensors and keeps its own part."""
        self._sync("load_weights")
        self._engine.load_weights(buckets)

    def read_weight(self, name: str) -> Any:
        return self._engine.read_weight(name)

    def part_of_weight(self, name: str, tensor: Any) -> Any:
        return self._engine.part_of_weight(name, tensor)

    def sleep(self) -> None:
        self._sync("sleep")
        self._engine.sleep()

    def wake(self, tags: Sequence[str] = WAKE_TAGS) -> None:
        self._add_to_checksum(" ".join(tags).encode())
        self._sync("wake")
        self._engine.wake(tags)

    def shutdown(self) -> None:
        self._engine.shutdown()

    def agree_on_batch(self, num_tokens: np.ndarray) -> None:
        """The engine has scheduled a batch and calls this before computing it. ``num_tokens``: i64[samples], of
        each."""
        if len(num_tokens):
            self._add_to_checksum(num_tokens.tobytes())
            self._sync("batch", num_samples=len(num_tokens), num_tokens=int(num_tokens.sum()))

    # ---- synchronization

    def _lead(self, command: str, payload: bytes = b"") -> None:
        assert self._members.rank == 0, f"only the leader calls {command}"
        self._sync(command, payload=payload)
        if payload:
            self._members.share(payload, len(payload))
            self._add_to_checksum(payload)

    def _receive(self) -> tuple[str, bytes]:
        leader = self._sync("follow")
        num_bytes = int(leader[-1])
        payload = self._members.share(b"", num_bytes) if num_bytes else b""
        if payload:
            self._add_to_checksum(payload)
        return CALLS[leader[0]], payload

    def _sync(self, call: str, *, num_samples: int = 0, num_tokens: int = 0, payload: bytes = b"") -> np.ndarray:
        """The leader's row. Raises RunError, at every member, if any member differs from the leader."""
        in_flight = self._engine.num_in_flight
        counts = (self._num_calls, self._num_steps, in_flight, num_samples, num_tokens)
        row = np.array([CALLS.index(call), *counts, self._checksum, len(payload)], np.int64)
        rows = self._members.gather(row)
        for name, other in zip(self._members.names[1:], rows[1:], strict=True):
            _require_same(self._members.names[0], rows[0], name, other)
        self._num_calls += 1
        return rows[0]

    def _step(self) -> EngineStep:
        result = self._with_checksum(self._engine.step())
        self._num_steps += 1
        return result

    def _with_checksum(self, result: EngineStep) -> EngineStep:
        """Tokens, not logprobs: kernels may differ in a last bit, and members only diverge when a token does."""
        for delta in result.deltas:
            self._add_to_checksum(f"{delta.request_id} {delta.finish_reason}".encode())
            self._add_to_checksum(delta.token_ids.tobytes())
        return result

    def _add_to_checksum(self, data: bytes) -> None:
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
                f"{theirs}, as at {leader_name}",
                "nothing was computed from it; the run can be resumed, and if this happens again, please report it",
            )
        )

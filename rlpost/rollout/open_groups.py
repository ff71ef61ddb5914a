"""The rollout buffer's records of a group while it is generated, scored and waiting: plain mutable objects.

``rollout.buffer`` is their only owner; ``rollout.collect`` reads them. Tokens may be here or only in the ledger: a
sample whose ``evicted`` is True holds none of its earlier segments, and callers that need them call
``rollout.buffer.RolloutBuffer.load_tokens`` first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rlpost.types import Group, Prompt, Sample, Segment

WAITING, RUNNING, PAUSED, FINISHED, SCORED = "waiting", "running", "paused", "finished", "scored"


@dataclass(slots=True)
class OpenSample:
    """One sample being generated; ``chunks`` hold the tokens of the current policy version."""

    index: int
    state: str = WAITING
    segments: tuple[Segment, ...] = ()  # those in memory; with ``evicted``, the rest is in the ledger
    evicted: bool = False
    chunks: list[tuple[np.ndarray, np.ndarray]] | None = None  # (token_ids, logprobs)
    num_tokens: int = 0  # of all segments, including evicted ones
    finish_reason: str = ""
    reward: float | None = None
    reward_parts: Mapping[str, float] | None = None  # None: no reward result yet, or one without parts
    failure: str | None = None
    first_step: int = -1  # the step that launched it
    mixed_kv: bool = False  # in this step it resumes with the KV cache of earlier steps

    def append(self, token_ids: np.ndarray, logprobs: np.ndarray) -> None:
        if self.chunks is None:
            self.chunks = []
        self.chunks.append((token_ids, logprobs))
        self.num_tokens += len(token_ids)

    def seal(self, policy_version: int) -> Segment | None:
        """Turn the current version's tokens into a segment and return it; None if there are none."""
        if not self.chunks:
            return None
        token_ids, logprobs = self.chunks[0]
        if len(self.chunks) > 1:  # a replica delivers a sample as a whole: one chunk, which need not be copied
            token_ids = np.concatenate([c[0] for c in self.chunks])
            logprobs = np.concatenate([c[1] for c in self.chunks])
        assert token_ids.dtype == np.int32 and logprobs.dtype == np.float32, (token_ids.dtype, logprobs.dtype)
        segment = Segment(token_ids, logprobs, policy_version, mixed_kv=self.mixed_kv)
        self.segments = (*self.segments, segment)
        self.chunks = None
        return segment

    def observe(self, token_ids: np.ndarray, policy_version: int) -> Segment:
        """Append tokens that the policy reads but did not sample; they have no logprobs and are not trained on."""
        assert not self.chunks and len(token_ids) and token_ids.dtype == np.int32, token_ids.dtype
        segment = Segment(token_ids, np.zeros(len(token_ids), np.float32), policy_version, trainable=False)
        self.segments = (*self.segments, segment)
        self.num_tokens += len(token_ids)
        return segment

    def restart(self) -> None:
        """Discard everything generated; the caller has counted it."""
        self.state, self.segments, self.evicted, self.chunks = WAITING, (), False, None
        self.num_tokens, self.finish_reason, self.first_step = 0, "", -1
        self.reward, self.reward_parts, self.failure = None, None, None


@dataclass(slots=True)
class OpenGroup:
    """One drawn prompt and its samples; ``order`` is the draw's number, which gives the group's age."""

    prompt: Prompt
    order: int
    drawn_step: int
    samples: list[OpenSample] = field(default_factory=list)
    attempt: int = 0  # how often it was restarted
    state: str = "open"  # open, scoring, ready, admitted
    oldest_version: int | None = None
    num_startable: int = 0  # samples that wait or are paused
    num_unfinished: int = 0  # those, plus the running ones
    num_unscored: int = 0
    frozen: Group | None = None  # built once; dropped together with the samples' tokens

    @property
    def uid(self) -> str:
        return self.prompt.uid

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.samples)

    @property
    def awaits_rewards(self) -> bool:
        return any(s.state == FINISHED for s in self.samples)

    def count_samples(self) -> None:
        """Set the three counts from the samples' states; later changes of a state must update them."""
        states = [s.state for s in self.samples]
        self.num_startable = states.count(WAITING) + states.count(PAUSED)
        self.num_unfinished = self.num_startable + states.count(RUNNING)
        self.num_unscored = len(states) - states.count(SCORED)

    def deadline(self, step: int, max_staleness: int) -> int:
        return (step if self.oldest_version is None else self.oldest_version) + max_staleness

    def phase(self) -> str:
        """``state``, with an open group split into waiting (nothing generated), in_flight and paused."""
        if self.state != "open":
            return self.state
        if any(s.state == RUNNING for s in self.samples):
            return "in_flight"
        return "paused" if any(s.num_tokens or s.finish_reason for s in self.samples) else "waiting"

    def freeze(self) -> Group:
        """The complete group in the form used for training; all its tokens must be in memory."""
        if self.frozen is not None:
            return self.frozen
        assert not any(s.evicted for s in self.samples), f"group {self.uid}: tokens are only in the ledger"
        samples = tuple(
            Sample(
                uid=self.uid,
                index=s.index,
                segments=s.segments,
                finish_reason=s.finish_reason,
                reward=s.reward,
                reward_parts=dict(s.reward_parts or {}),
                failure=s.failure,
            )
            for s in self.samples
        )
        self.frozen = Group(uid=self.uid, prompt=self.prompt, samples=samples)
        return self.frozen

"""The rollout buffer: every group drawn and not yet trained, and the counts that show that nothing is lost.

Owns the state of open groups (who waits, who runs, what was generated so far) and the ledger of promise 1. It never
talks to an engine, a scorer or the data: ``rollout.collect`` moves things in and out, ``loop`` settles what was
trained, ``checkpoint`` stores :meth:`RolloutBuffer.state_dict`. One owner, one thread.

A group is *open* (samples wait, run or are paused), *scoring* (all samples finished, verdicts pending), *ready*
(complete, not admitted) or *admitted*, and ends as trained, rejected[filter] or failed[reason].
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlpost.errors import RunError, explain
from rlpost.rollout.staleness import may_admit, may_draw
from rlpost.types import Group, Prompt, Sample, Segment

WAITING, RUNNING, PAUSED, FINISHED, JUDGED = "waiting", "running", "paused", "finished", "judged"
REWARD_FAILED = "reward"


@dataclass(slots=True)
class OpenSample:
    """One sample being generated; ``chunks`` hold the tokens of the current policy version."""

    index: int
    state: str = WAITING
    segments: tuple[Segment, ...] = ()
    chunks: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # (token_ids, logprobs)
    num_tokens: int = 0
    finish_reason: str = ""
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    first_step: int = -1  # the step that launched it

    def seal(self, policy_version: int) -> None:
        """Turn the current version's tokens into a segment."""
        if self.chunks:
            segment = Segment(
                token_ids=np.concatenate([c[0] for c in self.chunks]).astype(np.int32, copy=False),
                rollout_logprobs=np.concatenate([c[1] for c in self.chunks]).astype(np.float32, copy=False),
                policy_version=policy_version,
            )
            self.segments = (*self.segments, segment)
            self.chunks = []


@dataclass(slots=True)
class OpenGroup:
    """One drawn prompt and its samples; ``order`` is the draw's number, which is the group's age."""

    prompt: Prompt
    order: int
    drawn_step: int
    samples: list[OpenSample]
    state: str = "open"
    oldest_version: int | None = None

    def deadline(self, step: int, max_staleness: int) -> int:
        return (step if self.oldest_version is None else self.oldest_version) + max_staleness

    def freeze(self) -> Group:
        uid = self.prompt.uid
        samples = tuple(
            Sample(
                uid=uid,
                index=s.index,
                segments=s.segments,
                finish_reason=s.finish_reason,
                reward=s.reward,
                reward_parts=s.reward_parts,
                failure=s.failure,
            )
            for s in self.samples
        )
        return Group(uid=uid, prompt=self.prompt, samples=samples)


class LedgerError(RuntimeError):
    """The conservation check failed: a group or token is unaccounted for. Always a bug of ours."""


class RolloutBuffer:
    """See the module docstring. ``begin_step`` and ``settle`` frame each step of the loop.

    Args:
        groups_per_step: N, groups trained per step.
        samples_per_group: G.
        oversample: groups that may be open or admitted in a step, over N.
        max_staleness: S, in policy versions.
    """

    def __init__(self, *, groups_per_step: int, samples_per_group: int, oversample: float, max_staleness: int) -> None:
        self.groups_per_step = groups_per_step
        self.samples_per_group = samples_per_group
        self.max_open = int(oversample * groups_per_step)
        self.max_staleness = max_staleness
        self.step = 0
        self.groups: dict[str, OpenGroup] = {}  # untrained and not admitted, by uid
        self.admitted: list[OpenGroup] = []
        self.num_drawn = 0
        self.tokens_received = 0
        self.groups_ended: Counter[str] = Counter()  # "trained", "rejected[...]", "failed[...]"
        self.tokens_ended: Counter[str] = Counter()
        self._startable: list[tuple[int, int, int, str]] = []  # heap of (deadline, unfinished, order, uid)

    # ---- a step's frame -------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        assert not self.admitted, "settle() must be called before the next step begins"
        self.step = step
        self._startable = []
        for group in self.groups.values():
            self._offer(group)

    def settle(self, failed: Mapping[str, str] | None = None) -> list[Group]:
        """The admitted groups leave: trained, or failed[reason] where ``failed`` gives a uid its reason.

        The tokens of a sample without a reward are in no batch: they end as failed in a trained group, too.
        """
        failed = failed or {}
        groups = [g.freeze() for g in self.admitted]
        for group in groups:
            trained = group.uid not in failed
            self._end(group, "trained" if trained else f"failed[{failed[group.uid]}]")
            untrained = sum(s.num_tokens for s in group.samples if s.reward is None)
            if trained and untrained:
                self.tokens_ended["trained"] -= untrained
                self.tokens_ended[f"failed[{REWARD_FAILED}]"] += untrained
        self.admitted = []
        return groups

    # ---- drawing and scheduling -----------------------------------------------------------------------------

    def may_draw(self) -> bool:
        """Whether one more prompt may be drawn in this step."""
        return len(self.groups) + len(self.admitted) < self.max_open and may_draw(
            len(self.groups),
            admitted=len(self.admitted),
            groups_per_step=self.groups_per_step,
            max_staleness=self.max_staleness,
        )

    def add(self, prompt: Prompt) -> None:
        samples = [OpenSample(index=i) for i in range(self.samples_per_group)]
        group = OpenGroup(prompt=prompt, order=self.num_drawn, drawn_step=self.step, samples=samples)
        assert prompt.uid not in self.groups, f"prompt {prompt.uid} was drawn twice"
        self.groups[prompt.uid] = group
        self.num_drawn += 1
        self._offer(group)

    def next_sample(self) -> tuple[OpenGroup, OpenSample] | None:
        """The sample to start next: earliest deadline first (so carried-over groups come first), then the group with
        the fewest samples left, then the oldest. It counts as running from here on."""
        while self._startable:
            entry = heapq.heappop(self._startable)
            group = self.groups.get(entry[3])
            if group is None or entry != self._entry(group):
                continue  # a later entry of the same group holds its place
            sample = next((s for s in group.samples if s.state in (WAITING, PAUSED)), None)
            if sample is None:
                continue
            sample.state = RUNNING
            if sample.first_step < 0:
                sample.first_step = self.step
            self._offer(group)
            return group, sample
        return None

    # ---- what the engine and the scorer report --------------------------------------------------------------

    def receive(
        self, uid: str, index: int, token_ids: np.ndarray, logprobs: np.ndarray, finish_reason: str
    ) -> OpenSample:
        """New tokens of a running sample, in order, each exactly once."""
        group = self.groups[uid]
        sample = group.samples[index]
        assert sample.state == RUNNING and len(token_ids) == len(logprobs), (uid, index, sample.state)
        if len(token_ids):
            sample.chunks.append((token_ids, logprobs))
            sample.num_tokens += len(token_ids)
            self.tokens_received += len(token_ids)
            if group.oldest_version is None:
                group.oldest_version = self.step
        if finish_reason:
            sample.seal(self.step)
            sample.finish_reason = finish_reason
            sample.state = FINISHED
            if all(s.state in (FINISHED, JUDGED) for s in group.samples):
                group.state = "scoring"
            self._offer(group)
        return sample

    def pause_running(self) -> None:
        """After an abort: everything in flight keeps its tokens and waits for the next step."""
        for group in self.groups.values():
            for sample in group.samples:
                if sample.state == RUNNING:
                    sample.seal(self.step)
                    sample.state = PAUSED if sample.num_tokens else WAITING
            self._offer(group)

    def judge(self, uid: str, index: int, reward: float | None, parts: dict[str, float], failure: str | None) -> bool:
        """A verdict arrived; True when it was the group's last one, which makes the group ready."""
        group = self.groups[uid]
        sample = group.samples[index]
        assert sample.state == FINISHED and (reward is None) == (failure is not None), (uid, index, reward, failure)
        sample.reward, sample.reward_parts, sample.failure, sample.state = reward, parts, failure, JUDGED
        if all(s.state == JUDGED for s in group.samples):
            group.state = "ready"
            return True
        return False

    # ---- admission ------------------------------------------------------------------------------------------

    def ready(self) -> list[OpenGroup]:
        """Complete groups in the order they are considered: earliest deadline first, then age."""
        groups = [g for g in self.groups.values() if g.state == "ready"]
        return sorted(groups, key=lambda g: (g.deadline(self.step, self.max_staleness), g.order))

    def try_admit(self, group: OpenGroup) -> bool:
        """Admit a ready group to this step's batch if the staleness rule allows it."""
        slack = group.deadline(self.step, self.max_staleness) - self.step
        if not may_admit(self._due(), slack, admitted=len(self.admitted), groups_per_step=self.groups_per_step):
            return False
        del self.groups[group.prompt.uid]
        group.state = "admitted"
        self.admitted.append(group)
        return True

    def drop(self, group: OpenGroup, end: str) -> None:
        """A ready group that will not train: ``end`` is rejected[filter] or failed[reason]."""
        del self.groups[group.prompt.uid]
        self._end(group.freeze(), end)

    # ---- the ledger -----------------------------------------------------------------------------------------

    def states(self) -> Counter[str]:
        """Number of untrained groups by state."""
        return Counter([g.state for g in self.groups.values()] + ["admitted"] * len(self.admitted))

    def check_conservation(self) -> None:
        """Drawn groups and received tokens all stand in exactly one known place, and no group that was due in this
        step was left over; else LedgerError with the numbers. Holds after a step's last admission."""
        groups_known = len(self.groups) + len(self.admitted) + sum(self.groups_ended.values())
        held = sum(s.num_tokens for g in [*self.groups.values(), *self.admitted] for s in g.samples)
        tokens_known = held + sum(self.tokens_ended.values())
        if groups_known != self.num_drawn or tokens_known != self.tokens_received:
            raise LedgerError(
                f"conservation check failed at step {self.step}: {self.num_drawn} groups drawn, {groups_known} known "
                f"({dict(self.states())}, {dict(self.groups_ended)}); {self.tokens_received} tokens received, "
                f"{tokens_known} known ({held} held, {dict(self.tokens_ended)})"
            )
        late = [g.prompt.uid for g in self.groups.values() if g.deadline(self.step, self.max_staleness) <= self.step]
        if late:
            raise LedgerError(f"groups past their staleness deadline at step {self.step}: {late[:8]}")

    def longest_unfinished(self) -> int:
        """Tokens so far of the longest response that is to go on."""
        samples = [s for g in self.groups.values() for s in g.samples if not s.finish_reason]
        return max((s.num_tokens for s in samples), default=0)

    def state_dict(self) -> dict[str, Any]:
        """Everything as JSON values. Nothing may be running or admitted: call it between steps."""
        assert not self.admitted and not any(s.state == RUNNING for g in self.groups.values() for s in g.samples)
        return {
            "groups_per_step": self.groups_per_step,
            "samples_per_group": self.samples_per_group,
            "max_staleness": self.max_staleness,
            "step": self.step,
            "num_drawn": self.num_drawn,
            "tokens_received": self.tokens_received,
            "groups_ended": dict(self.groups_ended),
            "tokens_ended": dict(self.tokens_ended),
            "groups": [_group_to_json(g) for g in self.groups.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken. Raises RunError where fewer groups a step, or a smaller staleness, would
        leave waiting groups that can no longer be trained in time, and where groups would be of another size."""
        size = state["samples_per_group"]
        if self.samples_per_group != size:
            do = "set it as it was, or use another name"
            raise RunError(explain("resuming: rollout.samples_per_group", self.samples_per_group, str(size), do))
        for name in ("groups_per_step", "max_staleness"):
            if getattr(self, name) < state[name]:
                do = "set it as it was, or use another name"
                raise RunError(explain(f"resuming: rollout.{name}", getattr(self, name), f">= {state[name]}", do))
        self.step = state["step"]
        self.num_drawn = state["num_drawn"]
        self.tokens_received = state["tokens_received"]
        self.groups_ended = Counter(state["groups_ended"])
        self.tokens_ended = Counter(state["tokens_ended"])
        self.groups = {g["prompt"]["uid"]: _group_from_json(g) for g in state["groups"]}
        self.admitted = []
        self.check_conservation()

    # ---- private --------------------------------------------------------------------------------------------

    def _end(self, group: Group, end: str) -> None:
        self.groups_ended[end] += 1
        self.tokens_ended[end] += group.num_tokens

    def _due(self) -> list[int]:
        due = [0] * (self.max_staleness + 1)
        for group in self.groups.values():
            due[group.deadline(self.step, self.max_staleness) - self.step] += 1
        return due

    def _entry(self, group: OpenGroup) -> tuple[int, int, int, str]:
        unfinished = sum(s.state in (WAITING, PAUSED, RUNNING) for s in group.samples)
        return (group.deadline(self.step, self.max_staleness), unfinished, group.order, group.prompt.uid)

    def _offer(self, group: OpenGroup) -> None:
        if any(s.state in (WAITING, PAUSED) for s in group.samples):
            heapq.heappush(self._startable, self._entry(group))


def _group_to_json(group: OpenGroup) -> dict[str, Any]:
    prompt = group.prompt
    return {
        "prompt": {
            "uid": prompt.uid,
            "token_ids": prompt.token_ids.tolist(),
            "text": prompt.text,
            "reference": prompt.reference,
            "task": prompt.task,
            "columns": dict(prompt.columns),
        },
        "order": group.order,
        "drawn_step": group.drawn_step,
        "state": group.state,
        "oldest_version": group.oldest_version,
        "samples": [
            {
                "index": s.index,
                "state": s.state,
                "finish_reason": s.finish_reason,
                "reward": s.reward,
                "reward_parts": dict(s.reward_parts),
                "failure": s.failure,
                "first_step": s.first_step,
                "segments": [
                    {
                        "token_ids": seg.token_ids.tolist(),
                        "rollout_logprobs": seg.rollout_logprobs.tolist(),
                        "policy_version": seg.policy_version,
                        "trainable": seg.trainable,
                    }
                    for seg in s.segments
                ],
            }
            for s in group.samples
        ],
    }


def _group_from_json(row: dict[str, Any]) -> OpenGroup:
    prompt = row["prompt"] | {"token_ids": np.asarray(row["prompt"]["token_ids"], np.int32)}
    return OpenGroup(
        prompt=Prompt(**prompt),
        order=row["order"],
        drawn_step=row["drawn_step"],
        state=row["state"],
        oldest_version=row["oldest_version"],
        samples=[_sample_from_json(s) for s in row["samples"]],
    )


def _sample_from_json(row: dict[str, Any]) -> OpenSample:
    segments = tuple(_segment_from_json(s) for s in row["segments"])
    fields = {k: v for k, v in row.items() if k != "segments"}
    return OpenSample(segments=segments, num_tokens=sum(len(s.token_ids) for s in segments), **fields)


def _segment_from_json(row: dict[str, Any]) -> Segment:
    return Segment(
        token_ids=np.asarray(row["token_ids"], np.int32),
        rollout_logprobs=np.asarray(row["rollout_logprobs"], np.float32),
        policy_version=row["policy_version"],
        trainable=row["trainable"],
    )


def reconcile(groups: Iterable[OpenGroup]) -> list[tuple[OpenGroup, OpenSample]]:
    """Finished samples without a verdict: what must be handed to a fresh scorer after a resume."""
    return [(g, s) for g in groups for s in g.samples if s.state == FINISHED]

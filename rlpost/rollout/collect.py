"""Collect one step's rollout: APRIL, of which synchronous generation is the case ``oversample = 1.0``.

Per step: submit samples (carried-over groups first) until the engine's slots are full, refill one for one as samples
finish, judge finished samples beside generation, admit groups as they become complete, stop when N are admitted,
abort the rest and keep every token with its logprob for the next step.

Who waits for whom: the loop below waits for ``engine.step()`` while anything is in flight, and for the scorer only
when nothing is left to generate. Nothing here waits for a whole group or a wave.

Calls the engine, the buffer, the prompt stream and the scorer; called by ``loop``. Knows nothing of training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rlpost.engine.protocol import Delta, Engine, Request, SamplingSettings
from rlpost.errors import RunError, explain
from rlpost.rewards.scoring import Scorer, Verdict, failure_kind
from rlpost.rollout.buffer import REWARD_FAILED, LedgerError, RolloutBuffer
from rlpost.rollout.open_groups import OpenGroup, OpenSample
from rlpost.rollout.stats import RolloutStats, Stay
from rlpost.types import Group, Prompt

SCORE_POLL_S = 1.0  # how long one wait for verdicts lasts before the loop looks around again, for a stop request too


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectSettings:
    """What ``collect`` needs of the configuration."""

    max_in_flight: int
    max_response_tokens: int
    sampling: SamplingSettings
    seed: int
    max_filtered_groups: int
    reject: Callable[[Group], str | None]  # the algorithm's filter: a reason, or None to keep
    max_failure_share: float = 1.0
    keep_kv: bool = False  # what is in flight when a step ends goes on in the next one with its KV cache
    score_every: int = 0  # deterministic mode: engine steps between two looks at the verdicts; 0: whenever one is there


OnProgress = Callable[[int, int, int], None]  # (groups admitted, samples running, groups open)


def collect(
    engine: Engine,
    buffer: RolloutBuffer,
    prompts: Iterator[Prompt],
    scorer: Scorer,
    settings: CollectSettings,
    *,
    step: int,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RolloutStats:
    """Generate until ``buffer.admitted`` holds ``groups_per_step`` groups; leaves nothing in flight.

    The engine's weights are those of policy version ``step``. Afterwards ``buffer.admitted`` is the step's rollout; it
    is empty and ``stats.stopped`` True where ``should_stop`` ended the step early.

    Raises:
        RunError: the filter rejected ``max_filtered_groups`` groups in a row, or too many rewards failed.
    """
    buffer.begin_step(step)
    stats = RolloutStats(step=step, slots=settings.max_in_flight, started_s=engine.now())
    run = _Collection(engine, buffer, prompts, scorer, settings, stats)
    run.go_on()
    run.resubmit_unjudged()
    run.take_verdicts()
    run.admit_ready()
    while len(buffer.admitted) < buffer.groups_per_step:
        if should_stop():
            stats.stopped = True
            break
        iteration_started = engine.now()
        run.fill_slots()
        if engine.num_in_flight:
            result = engine.step()
            run.receive(result.deltas)
            if result.returned:
                run.take_back(result.returned)
            if run.verdicts_are_due():
                run.take_verdicts()
            stats.num_prefill += result.num_prefill_tokens
            stats.work.add_step(engine.now() - iteration_started, result)
        elif scorer.num_pending:
            scorer.wait(SCORE_POLL_S)
            run.take_verdicts()
        else:  # the proof in rollout.staleness says this cannot be; waiting would be for ever
            raise LedgerError(f"step {step} cannot go on: {dict(buffer.states())}, none running, none to be drawn")
        if on_progress is not None:
            on_progress(len(buffer.admitted), engine.num_in_flight, len(buffer.groups))
    run.abort(keep=settings.keep_kv and not stats.stopped)
    if stats.stopped:
        buffer.release_admitted()
    stats.ended_s = engine.now()
    run.measure_lengths()
    run.stop_where_rewards_fail()
    return stats


def sample_seed(run_seed: int, uid: str, index: int, num_tokens: int, attempt: int = 0) -> int:
    """The engine's seed for a sample from its ``num_tokens``-th token on, the same in every process and replay.

    A resumed sample gets a fresh seed: with the old one the noise stream would start again. So does a restarted one.
    """
    key = f"{run_seed}|{uid}|{index}|{attempt}|{num_tokens}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1  # a non-negative int64


class _Collection:
    """The moves of one ``collect`` call."""

    def __init__(
        self,
        engine: Engine,
        buffer: RolloutBuffer,
        prompts: Iterator[Prompt],
        scorer: Scorer,
        settings: CollectSettings,
        stats: RolloutStats,
    ) -> None:
        self.engine, self.buffer, self.prompts, self.scorer = engine, buffer, prompts, scorer
        self.settings, self.stats = settings, stats
        self.filtered_in_a_row = 0
        self.running: dict[str, Stay] = {}  # by request id

    def go_on(self) -> None:
        """Samples whose KV cache the engine kept over the publication run from the start of the step."""
        kept = [(request_id, *request_id.rpartition("/")[::2]) for request_id in self.engine.go_on()]
        if not kept:
            return
        pairs = [self.buffer.go_on(uid, int(index)) for _, uid, index in kept]
        self.buffer.load_tokens(*zip(*pairs, strict=True))
        now = self.engine.now()
        for (request_id, _, _), (group, sample) in zip(kept, pairs, strict=True):
            self.running[request_id] = Stay(group, sample, now, sample.num_tokens, "kept", 0)
        self.stats.num_kept = len(kept)

    def resubmit_unjudged(self) -> None:
        """After a resume the scorer is new: samples whose verdict was pending are handed to it again."""
        unjudged = self.buffer.unjudged()
        if unjudged and not self.scorer.num_pending:  # else it is the one that holds those verdicts
            self.buffer.load_tokens(*zip(*unjudged, strict=True))
            for group, sample in unjudged:
                self.submit_for_judging(group, sample)

    def fill_slots(self) -> None:
        """One-for-one refill: whatever is free takes the next sample; prompts are drawn only when none waits."""
        chosen: list[tuple[OpenGroup, OpenSample]] = []
        engine = self.engine
        free = min(self.settings.max_in_flight, engine.max_slots) + engine.reserve - engine.num_in_flight
        while len(chosen) < free:
            found = self.buffer.next_samples(free - len(chosen))
            if found:
                chosen += found
            elif self.buffer.may_draw():
                self.buffer.add(next(self.prompts))
            else:
                break
        if chosen:
            self.buffer.load_tokens(*zip(*chosen, strict=True))
            now, step = engine.now(), self.buffer.step
            requests = [self.make_request(group, sample) for group, sample in chosen]
            replicas = engine.submit(requests)
            for (group, sample), request, replica in zip(chosen, requests, replicas, strict=True):
                kind = "launched" if sample.first_step == step and not sample.num_tokens else "resumed"
                self.running[request.request_id] = Stay(group, sample, now, sample.num_tokens, kind, replica)

    def make_request(self, group: OpenGroup, sample: OpenSample) -> Request:
        settings, uid, index, so_far = self.settings, group.prompt.uid, sample.index, sample.num_tokens
        parts = (group.prompt.token_ids, *[s.token_ids for s in sample.segments])
        if so_far:
            self.stats.num_resumed += 1
            self.stats.num_replayed += len(group.prompt.token_ids) + so_far
        elif sample.first_step == self.buffer.step:
            self.stats.num_launched += 1
        seed = sample_seed(settings.seed, uid, index, so_far, group.attempt)
        return Request(f"{uid}/{index}", parts, settings.max_response_tokens - so_far, seed, settings.sampling)

    def receive(self, deltas: Sequence[Delta]) -> None:
        buffer, running, spans = self.buffer, self.running, self.stats.spans
        step, now, before = buffer.step, self.engine.now(), buffer.tokens_received
        for request_id, token_ids, logprobs, finish_reason in deltas:
            stay = running[request_id]
            group, sample = stay.group, stay.sample
            buffer.receive(group, sample, token_ids, logprobs, finish_reason)
            if finish_reason:
                del running[request_id]
                spans.add(stay, step, now, finish_reason)
                self.submit_for_judging(group, sample)
        self.stats.num_generated += buffer.tokens_received - before

    def take_back(self, returned: Sequence[Delta]) -> None:
        """Samples whose replica was lost: what it had handed over is theirs, and they may start again elsewhere."""
        now = self.engine.now()
        for delta in returned:
            stay = self.running.pop(delta.request_id)
            self.buffer.receive(stay.group, stay.sample, delta.token_ids, delta.logprobs, "")
            self.stats.num_generated += len(delta.token_ids)
            self.stats.spans.add(stay, self.buffer.step, now, "lost")
            if not stay.sample.num_tokens and stay.sample.first_step == self.buffer.step:
                self.stats.num_launched -= 1  # it is to be launched again
            self.buffer.pause(stay.group, stay.sample)

    def submit_for_judging(self, group: OpenGroup, sample: OpenSample) -> None:
        self.scorer.submit(group.prompt, sample.index, [s.token_ids for s in sample.segments], sample.finish_reason)

    def verdicts_are_due(self) -> bool:
        return not self.settings.score_every or len(self.stats.work.step_s) % self.settings.score_every == 0

    def take_verdicts(self) -> None:
        """Take in the verdicts that are there, let filters speak, admit. In deterministic mode: of all samples finished
        by now, however long that takes, in the order of the samples."""
        while self.settings.score_every and not self.scorer.drain(SCORE_POLL_S):
            pass
        verdicts = list(self.scorer.poll())
        if self.settings.score_every:
            verdicts.sort(key=lambda v: (self.buffer.groups[v.uid].order, v.index))
        for verdict in verdicts:
            self.judge(verdict)
        if self.stats.num_judged >= self.buffer.groups_per_step * self.buffer.samples_per_group:
            self.stop_where_rewards_fail()  # where most rewards fail, a step's end may never come
        if verdicts:
            self.admit_ready()

    def judge(self, verdict: Verdict) -> None:
        self.stats.num_judged += 1
        if verdict.failure is not None:
            kind = failure_kind(verdict.failure)
            self.stats.failures[kind] = self.stats.failures.get(kind, 0) + 1
            self.stats.num_failed_rewards += 1
            self.stats.last_failure = verdict.failure
        group = self.buffer.groups[verdict.uid]
        if self.buffer.judge(group, group.samples[verdict.index], verdict.reward, verdict.parts, verdict.failure):
            self.filter(group)

    def admit_ready(self) -> None:
        """Admit what the staleness rule allows, earliest deadline first."""
        for group in self.buffer.ready():
            if len(self.buffer.admitted) >= self.buffer.groups_per_step:
                return
            if self.buffer.try_admit(group):
                self.filtered_in_a_row = 0
            elif not self.buffer.restart_stale:
                return  # what is due later is refused, too: rule 2 asks more of it

    def filter(self, group: OpenGroup) -> None:
        """A complete group is dropped here, for a named reason, or stays ready."""
        self.buffer.load_tokens([group])
        frozen = group.freeze()  # and kept: most groups train in the step in which they are complete
        if len(frozen.scored) < min(2, len(frozen.samples)):
            self.drop(group, f"failed[{REWARD_FAILED}]", REWARD_FAILED)
            return
        reason = self.settings.reject(frozen)
        if reason is not None:
            self.drop(group, f"rejected[{reason}]", reason)

    def drop(self, group: OpenGroup, end: str, reason: str) -> None:
        self.buffer.drop(group, end)
        self.stats.dropped.append((group.uid, end))
        self.stats.dropped_lengths[group.order] = [s.num_tokens for s in group.samples]
        self.stats.rejected[reason] = self.stats.rejected.get(reason, 0) + 1
        self.filtered_in_a_row += 1
        if self.filtered_in_a_row >= self.settings.max_filtered_groups:
            last = self.stats.last_failure
            detail = f" (last reward failure: {last})" if last else ""
            raise RunError(
                explain(
                    f"step {self.buffer.step}: groups dropped in a row without one to train on",
                    f"{self.filtered_in_a_row} ({self.stats.rejected}){detail}",
                    f"fewer than algo.max_filtered_groups={self.settings.max_filtered_groups}",
                    "check that rewards vary within a group (too easy, too hard, failing?), or set algo.filter=none",
                )
            )

    def abort(self, *, keep: bool) -> None:
        """Every token so far is the buffer's; with ``keep`` the engine may hold on to requests for the next step."""
        started = self.engine.now()
        last = self.engine.pause_all() if keep else self.engine.abort_all()
        self.receive(last.deltas)
        if last.iterations is not None:
            self.stats.work.add_step(self.engine.now() - started, last)
            self.stats.num_prefill += last.num_prefill_tokens
        else:
            self.stats.abort_s = self.engine.now() - started
        assert self.engine.num_in_flight == 0, "the engine kept requests after an abort"
        now, step = self.engine.now(), self.buffer.step
        for stay in self.running.values():
            self.stats.spans.add(stay, step, now, "paused")
            self.buffer.pause(stay.group, stay.sample, go_on=False)
        self.running.clear()
        if self.settings.score_every and self.scorer.num_pending:
            self.take_verdicts()  # so that a step's end depends on nothing that is still being judged

    def measure_lengths(self) -> None:
        for group in [*self.buffer.groups.values(), *self.buffer.admitted]:
            open_group = group.state == "open"
            for sample in group.samples:
                if sample.first_step == self.buffer.step:
                    self.stats.launched_lengths.append(sample.num_tokens)
                if open_group and not sample.finish_reason and sample.num_tokens:
                    self.stats.deferred_lengths.append(sample.num_tokens)

    def stop_where_rewards_fail(self) -> None:
        """Raises RunError when a larger share of the step's rewards failed than the settings allow."""
        failed, judged = self.stats.num_failed_rewards, self.stats.num_judged
        if judged and failed / judged > self.settings.max_failure_share:
            raise RunError(
                explain(
                    f"step {self.buffer.step}: share of rewards that failed",
                    f"{failed} of {judged} ({self.stats.failures})",
                    f"at most reward.max_failure_share={self.settings.max_failure_share}",
                    f"mend the reward function (last failure: {self.stats.last_failure})",
                )
            )

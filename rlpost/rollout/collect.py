"""Generate and score samples until a step's rollout is complete: the only loop over an engine.

APRIL per step: submit samples (carried-over groups first) until the engine's slots are full, refill one for one as
samples finish, score finished samples while others are generated, admit groups as they become complete, stop when N are
admitted, abort the rest and keep every token with its logprob for the next step. Synchronous rollouts are the case
``oversample = 1.0``, and an evaluation is one synchronous step over the problems (``evaluation.evaluate``).

Who waits for whom: the loop waits for ``engine.step()`` while anything is in flight, and for the scorer only when
nothing is left to generate. It never waits for a whole group or a wave.

Called by ``loop`` and ``evaluation``. Calls the engine, the buffer, the prompt stream and the scorer. Knows nothing
about training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlpost.engine.protocol import Delta, Engine, Request, SamplingSettings
from rlpost.errors import RunError, explain
from rlpost.rewards.scoring import RewardResult, Scorer, failure_kind
from rlpost.rollout.accounts import REWARD_FAILED, LedgerError
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.open_groups import OpenGroup, OpenSample
from rlpost.rollout.stats import InFlight, RolloutStats
from rlpost.rollout.turns import AfterTurn, score_it
from rlpost.types import Group, Prompt

SCORE_POLL_S = 1.0  # longest wait for reward results before the loop checks again, also for a stop request


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectSettings:
    """What ``collect`` needs from the configuration."""

    max_in_flight: int
    max_response_tokens: int
    sampling: SamplingSettings
    seed: int
    max_filtered_groups: int
    reject: Callable[[Group], str | None]  # the algorithm's filter: a reason to reject, or None to keep
    after_turn: AfterTurn = score_it
    drop_failed: bool = True  # drop groups with fewer than two rewards (groups of one: none): nothing to train on
    max_failure_share: float = 1.0
    keep_kv: bool = False  # samples in flight at the end of a step resume in the next one with their KV cache
    score_every: int = 0  # deterministic mode: engine steps between two polls for results; 0: poll at every step
    seed_scope: str = ""  # prefix of the uid, so that another sampling of the same prompt gets other seeds


class CollectProgress(NamedTuple):
    admitted: int  # groups
    running: int  # samples in the engine
    open_groups: int
    finished: int  # samples, in this call


OnProgress = Callable[[CollectProgress], None]


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

    The engine's weights are those of policy version ``step``. Afterwards ``buffer.admitted`` is the step's rollout; if
    ``should_stop`` ended the step early, it is empty and ``stats.stopped`` is True.

    Raises:
        RunError: the filter rejected ``max_filtered_groups`` groups in a row, or too many rewards failed.
    """
    buffer.begin_step(step)
    stats = RolloutStats(step=step, slots=settings.max_in_flight, started_s=engine.now())
    collector = _Collector(engine, buffer, prompts, scorer, settings, stats)
    collector.resume_kept()
    collector.resubmit_unscored()
    collector.take_reward_results()
    collector.admit_ready()
    while not buffer.is_full:
        if should_stop():
            stats.stopped = True
            break
        iteration_started = engine.now()
        collector.fill_slots()
        if engine.num_in_flight:
            result = engine.step()
            collector.receive(result.deltas)
            if result.returned:
                collector.requeue_lost(result.returned)
            if collector.results_are_due():
                collector.take_reward_results()
            stats.num_prefill += result.num_prefill_tokens
            stats.work.add_step(engine.now() - iteration_started, result)
        elif scorer.num_pending:
            scorer.wait(SCORE_POLL_S)
            collector.take_reward_results()
        else:  # the proof in rollout.staleness rules this out; waiting would take forever
            raise LedgerError(f"step {step} cannot continue: {dict(buffer.states())}, none running, none to be drawn")
        if on_progress is not None:
            counts = len(buffer.admitted), engine.num_in_flight, len(buffer.groups), stats.num_finished
            on_progress(CollectProgress(*counts))
    collector.abort(keep=settings.keep_kv and not stats.stopped)
    if stats.stopped:
        buffer.release_admitted()
    stats.ended_s = engine.now()
    collector.measure_lengths()
    collector.stop_if_rewards_fail()
    return stats


def sample_seed(run_seed: int, uid: str, index: int, num_tokens: int, attempt: int = 0) -> int:
    """The engine's seed for a sample from its ``num_tokens``-th token on; the same in every process and replay.

    A resumed or restarted sample gets a new seed: the old one would repeat the same noise stream.
    """
    key = f"{run_seed}|{uid}|{index}|{attempt}|{num_tokens}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1  # a non-negative int64


class _Collector:
    """The operations of one ``collect`` call."""

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
        self.running: dict[str, InFlight] = {}  # by request id

    def resume_kept(self) -> None:
        """Samples whose KV cache the engine kept across the publication run from the start of the step."""
        kept = [(request_id, *request_id.rpartition("/")[::2]) for request_id in self.engine.resume()]
        if not kept:
            return
        pairs = [self.buffer.resume(uid, int(index)) for _, uid, index in kept]
        self.buffer.load_tokens(*zip(*pairs, strict=True))
        now = self.engine.now()
        for (request_id, _, _), (group, sample) in zip(kept, pairs, strict=True):
            self.running[request_id] = InFlight(group, sample, now, sample.num_tokens, "kept", 0)
        self.stats.num_kept = len(kept)

    def resubmit_unscored(self) -> None:
        """After a resume the scorer is new: submit the samples whose reward results were pending."""
        unscored = self.buffer.unscored()
        if unscored and not self.scorer.num_pending:  # otherwise this scorer already has them
            self.buffer.load_tokens(*zip(*unscored, strict=True))
            for group, sample in unscored:
                self.submit_for_scoring(group, sample)

    def fill_slots(self) -> None:
        """One-for-one refill: each free slot takes the next sample; prompts are drawn only when none waits."""
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
                self.running[request.request_id] = InFlight(group, sample, now, sample.num_tokens, kind, replica)

    def make_request(self, group: OpenGroup, sample: OpenSample) -> Request:
        settings, uid, index, so_far = self.settings, group.prompt.uid, sample.index, sample.num_tokens
        parts = (group.prompt.token_ids, *[s.token_ids for s in sample.segments])
        if so_far:
            self.stats.num_resumed += 1
            self.stats.num_replayed += len(group.prompt.token_ids) + so_far
        elif sample.first_step == self.buffer.step:
            self.stats.num_launched += 1
        seed = sample_seed(settings.seed, settings.seed_scope + uid, index, so_far, group.attempt)
        return Request(f"{uid}/{index}", parts, settings.max_response_tokens - so_far, seed, settings.sampling)

    def receive(self, deltas: Sequence[Delta]) -> None:
        buffer, running, stats = self.buffer, self.running, self.stats
        now = self.engine.now()
        for request_id, token_ids, logprobs, finish_reason in deltas:
            flight = running[request_id]
            buffer.receive(flight.group, flight.sample, token_ids, logprobs)
            stats.num_generated += len(token_ids)
            if finish_reason:
                del running[request_id]
                stats.spans.add(flight, buffer.step, now, finish_reason)
                self.end_turn(flight.group, flight.sample, finish_reason)

    def end_turn(self, group: OpenGroup, sample: OpenSample, finish_reason: str) -> None:
        """The model ended its turn, or was cut at the limit: the sample gets another turn, or is scored."""
        self.buffer.end_turn(group, sample)
        if finish_reason == "stop":
            observation = self.settings.after_turn(group.prompt, sample.segments)
            if observation is not None:
                if sample.num_tokens + len(observation.token_ids) < self.settings.max_response_tokens:
                    self.buffer.observe(group, sample, observation.token_ids)
                    self.stats.num_observed += len(observation.token_ids)
                    return
                finish_reason = "length"  # no room for the observation
        self.buffer.finish(group, sample, finish_reason)
        self.stats.num_finished += 1
        self.submit_for_scoring(group, sample)

    def requeue_lost(self, returned: Sequence[Delta]) -> None:
        """Samples of a lost replica keep the tokens it delivered, and may start again on another replica."""
        now = self.engine.now()
        for delta in returned:
            flight = self.running.pop(delta.request_id)
            self.buffer.receive(flight.group, flight.sample, delta.token_ids, delta.logprobs)
            self.stats.num_generated += len(delta.token_ids)
            self.stats.spans.add(flight, self.buffer.step, now, "lost")
            if not flight.sample.num_tokens and flight.sample.first_step == self.buffer.step:
                self.stats.num_launched -= 1  # it will be launched again
            self.buffer.pause(flight.group, flight.sample)

    def submit_for_scoring(self, group: OpenGroup, sample: OpenSample) -> None:
        self.scorer.submit(group.prompt, sample.index, [s.token_ids for s in sample.segments], sample.finish_reason)

    def results_are_due(self) -> bool:
        return not self.settings.score_every or len(self.stats.work.step_s) % self.settings.score_every == 0

    def take_reward_results(self) -> None:
        """Take in the available reward results, apply the filter, admit. In deterministic mode: wait for the results
        of all samples finished so far, and take them in the order of the samples."""
        while self.settings.score_every and not self.scorer.drain(SCORE_POLL_S):
            pass
        results = list(self.scorer.poll())
        if self.settings.score_every:
            results.sort(key=lambda r: (self.buffer.groups[r.uid].order, r.index))
        for result in results:
            self.score(result)
        if self.stats.num_scored >= self.buffer.strategy.samples_per_step:
            self.stop_if_rewards_fail()  # if most rewards fail, the step might never end
        if results:
            self.admit_ready()

    def score(self, result: RewardResult) -> None:
        self.stats.num_scored += 1
        if result.failure is not None:
            kind = failure_kind(result.failure)
            self.stats.failures[kind] = self.stats.failures.get(kind, 0) + 1
            self.stats.num_failed_rewards += 1
            self.stats.last_failure = result.failure
        group = self.buffer.groups[result.uid]
        if self.buffer.score(group, group.samples[result.index], result.reward, result.parts, result.failure):
            self.filter(group)

    def admit_ready(self) -> None:
        """Admit what the staleness rule allows, earliest deadline first."""
        for group in self.buffer.schedule.candidates():
            if self.buffer.is_full:
                return
            if self.buffer.try_admit(group):
                self.filtered_in_a_row = 0
            elif not self.buffer.strategy.restart_stale:
                return  # groups due later are refused, too: rule 2 demands more of them

    def filter(self, group: OpenGroup) -> None:
        """Drop a complete group for a named reason, or leave it ready."""
        self.buffer.load_tokens([group])
        frozen = group.freeze()  # kept: most groups train in the step in which they complete
        if self.settings.drop_failed and len(frozen.scored) < min(2, len(frozen.samples)):
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
        """Take every token so far into the buffer; with ``keep``, the engine may keep requests for the next step."""
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
        for flight in self.running.values():
            self.stats.spans.add(flight, step, now, "paused")
            self.buffer.pause(flight.group, flight.sample, startable=False)
        self.running.clear()
        if self.settings.score_every and self.scorer.num_pending:
            self.take_reward_results()  # so that the end of a step does not depend on pending scores

    def measure_lengths(self) -> None:
        for group in [*self.buffer.groups.values(), *self.buffer.admitted]:
            open_group = group.state == "open"
            for sample in group.samples:
                if sample.first_step == self.buffer.step:
                    self.stats.launched_lengths.append(sample.num_tokens)
                if open_group and not sample.finish_reason and sample.num_tokens:
                    self.stats.deferred_lengths.append(sample.num_tokens)

    def stop_if_rewards_fail(self) -> None:
        """Raises RunError if a larger share of the step's rewards failed than the settings allow."""
        failed, scored = self.stats.num_failed_rewards, self.stats.num_scored
        if scored and failed / scored > self.settings.max_failure_share:
            raise RunError(
                explain(
                    f"step {self.buffer.step}: share of rewards that failed",
                    f"{failed} of {scored} ({self.stats.failures})",
                    f"at most reward.max_failure_share={self.settings.max_failure_share}",
                    f"fix the reward function (last failure: {self.stats.last_failure})",
                )
            )

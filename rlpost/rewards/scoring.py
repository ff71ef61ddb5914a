"""Scoring finished samples: turns tokens into text, has the reward called, and makes every outcome a counted fact.

``collect`` submits samples and polls reward results; a result is a number or a named failure, never a silent zero.
:class:`RewardScorer` combines the results of the reward's functions: it holds a sample back until its group is complete
if a function scores groups, consults the cache, retries failed calls, and adds weighted parts. Where the functions run,
in this process or in workers, is decided by ``rewards.worker_pool``.

Training and evaluation each have their own scorer on the same workers, so their results never mix. Only the run's main
thread uses a scorer; results reach it through a queue.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np

from rlpost.config import RewardConfig
from rlpost.rewards.functions import FunctionFacts, LoadedFunction, Question, Response
from rlpost.rewards.outcomes import Outcome
from rlpost.rewards.result_cache import RewardResultCache, digest_call
from rlpost.rewards.selection import FunctionSpec
from rlpost.rewards.values import THOUGHT_START, read_outcome
from rlpost.rewards.worker_pool import Call, CallResult, Calls, InlineCalls
from rlpost.types import Prompt

__all__ = [
    "InlineScorer",
    "RewardScorer",
    "Scorer",
    "ScoringCounts",
    "RewardResult",
    "failure_kind",
    "make_decode",
    "read_outcome",
]

RewardFunction = Callable[
    ..., Any
]  # (response, *, prompt, reference, finish_reason, columns) -> float | dict[str, float]
Decode = Callable[[Sequence[np.ndarray]], str]  # i32[...] each, a response's tokens in parts -> text
TAIL_TOKENS = 32  # of a prompt: room for <think> in single characters, and line ends after it
CHECK_S = 1.0  # while waiting, how often to check whether the workers still work


@dataclass(frozen=True, slots=True)
class RewardResult:
    """``reward`` is None exactly if ``failure`` gives the reason."""

    uid: str
    index: int
    reward: float | None
    parts: Mapping[str, float]
    failure: str | None = None


@dataclass(kw_only=True, slots=True)
class ScoringCounts:
    """What scoring cost since the last call."""

    calls: int = 0  # of a function, without those answered by the cache
    call_s: float = 0.0  # their sum, from the start of each to its result
    max_call_s: float = 0.0
    retried: int = 0  # calls that failed and were retried
    cache_lookups: int = 0
    cache_hits: int = 0
    replaced_workers: int = 0


class Scorer(Protocol):
    def submit(self, prompt: Prompt, index: int, parts: Sequence[np.ndarray], finish_reason: str) -> None:
        """``parts``: i32[...] each, the response's tokens in order."""

    def poll(self) -> Sequence[RewardResult]:
        """Reward results that arrived since the last call; never blocks."""

    @property
    def num_pending(self) -> int:
        """Samples submitted whose result has not been polled yet."""

    def wait(self, timeout_s: float) -> None:
        """Block until a result can be polled, at most ``timeout_s``."""

    def drain(self, timeout_s: float) -> bool:
        """Block until every result that needs no further submissions can be polled; False: not in time.

        Samples whose group is not complete yet are not awaited. Results arrive in any order; they carry ``uid`` and
        ``index`` for callers that need one.
        """

    def forget(self) -> None:
        """Discard the samples whose results have not been polled yet; they no longer count."""

    def close(self) -> None: ...


@dataclass(slots=True)
class _Sample:
    """A sample between its submission and its result."""

    uid: str
    index: int
    response: Response
    outcomes: list[Outcome | None]  # by function; None: not called yet, or no result yet


@dataclass(slots=True)
class _PendingCall:
    """A call in progress: the samples it scores, and how many retries it has left."""

    samples: list[_Sample]
    call: Call
    key: str | None
    retries_left: int


class RewardScorer:
    """See the module docstring.

    Args:
        decode: the response's token ids to text, without the end token.
        group_size: samples per prompt, for functions that score groups.
        retries: how often a failed call is retried before its failure counts.
        cache: of reward results; None: off.
    """

    def __init__(
        self,
        calls: Calls,
        decode: Decode,
        *,
        group_size: int = 1,
        retries: int = 0,
        cache: RewardResultCache | None = None,
    ) -> None:
        self.cache = cache
        self._calls, self._decode = calls, decode
        self._group_size, self._retries = group_size, retries
        self._take_tokens: bool | None = None
        self._score_groups = False
        self._read_answers = False
        self._unpolled: list[RewardResult] = []
        self._num_open = 0  # samples without a result yet
        self._held: dict[str, list[_Sample]] = {}  # by uid, until the group is complete
        self._calls_in_progress: dict[int, _PendingCall] = {}  # by our own number
        self._completed: list[
            tuple[_PendingCall, CallResult]
        ] = []  # calls completed at once, until the submission ends
        self._next_number = 0
        self._results: SimpleQueue[tuple[int, CallResult]] = SimpleQueue()
        self._counts = ScoringCounts()

    # ---- the protocol ----------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, index: int, parts: Sequence[np.ndarray], finish_reason: str) -> None:
        facts = self._calls.facts
        kept: tuple[int, ...] = ()
        if self._take_tokens is None:  # known once the functions are loaded
            self._take_tokens = any(one.takes_tokens for one in facts)
            self._score_groups = any(one.per_group for one in facts)
            self._read_answers = any(one.text == "answer" for one in facts)
        if self._take_tokens:
            kept = tuple(chain.from_iterable(part.tolist() for part in parts))
        response = Response(self._decode(parts), finish_reason, kept)
        sample = _Sample(prompt.uid, index, response, [None] * len(facts))
        self._num_open += 1
        opens_thought = self._read_answers and self._opens_thought(prompt)
        question = Question(prompt.text, prompt.reference, dict(prompt.columns), opens_thought)
        group = self._complete_group(sample) if self._score_groups else []
        for number, one in enumerate(facts):
            if not one.per_group:
                self._submit_call(number, one, question, [sample])
            elif group:
                self._submit_call(number, one, question, group)
        self._settle_completed()

    def poll(self) -> Sequence[RewardResult]:
        self._take_in()
        results, self._unpolled = self._unpolled, []
        return results

    @property
    def num_pending(self) -> int:
        return self._num_open + len(self._unpolled)

    def wait(self, timeout_s: float) -> None:
        self._wait(timeout_s, lambda: bool(self._unpolled))

    def drain(self, timeout_s: float) -> bool:
        return self._wait(timeout_s, lambda: not self._calls_in_progress)

    def forget(self) -> None:
        self._calls_in_progress.clear()
        self._held.clear()
        self._unpolled.clear()
        self._num_open = 0

    def close(self) -> None:
        """Discards pending results; the workers are closed by whoever started them."""
        self.forget()

    def take_counts(self) -> ScoringCounts:
        """Counts since the last call."""
        counts, self._counts = self._counts, ScoringCounts()
        counts.replaced_workers = self._calls.take_replaced()
        return counts

    # ---- private ---------------------------------------------------------------------------------------------

    def _opens_thought(self, prompt: Prompt) -> bool:
        """Whether the prompt's tokens, which a chat template may have ended, end in ``<think>``."""
        return self._decode([prompt.token_ids[-TAIL_TOKENS:]]).rstrip().endswith(THOUGHT_START)

    def _complete_group(self, sample: _Sample) -> list[_Sample]:
        """The group in the order of its indices if ``sample`` was its last one, else nothing."""
        held = self._held.setdefault(sample.uid, [])
        held.append(sample)
        if len(held) < self._group_size:
            return []
        return sorted(self._held.pop(sample.uid), key=lambda one: one.index)

    def _submit_call(self, function: int, facts: FunctionFacts, question: Question, samples: list[_Sample]) -> None:
        responses = [sample.response for sample in samples]
        if self._take_tokens and not facts.takes_tokens:
            responses = [Response(r.text, r.finish_reason) for r in responses]
        call = Call(function, question, tuple(responses))
        key = None
        if self.cache is not None and facts.cacheable:
            key = digest_call(call, facts)
            self._counts.cache_lookups += 1
            known = self.cache.get(key)
            if known is not None and len(known) == len(samples):
                self._counts.cache_hits += 1
                self._settle(function, samples, known)
                return
        self._run_call(_PendingCall(samples, call, key, self._retries))

    def _run_call(self, pending: _PendingCall) -> None:
        number = self._next_number
        self._next_number += 1
        while True:
            result = self._calls.submit(pending.call, number, self._results.put)
            if result is None:
                self._calls_in_progress[number] = pending
                return
            if not self._should_retry(pending, result):
                self._completed.append((pending, result))
                return

    def _wait(self, timeout_s: float, done: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + timeout_s
        self._take_in()
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            try:
                arrived = self._results.get(timeout=min(left, CHECK_S))
            except Empty:
                self._calls.check()
            else:
                self._recognize([arrived])
        return True

    def _take_in(self) -> None:
        arrived = []
        while not self._results.empty():
            arrived.append(self._results.get())
        self._recognize(arrived)
        self._calls.check()

    def _recognize(self, arrived: list[tuple[int, CallResult]]) -> None:
        for number, result in arrived:
            pending = self._calls_in_progress.pop(number, None)
            if pending is None:  # discarded
                continue
            if self._should_retry(pending, result):
                self._run_call(pending)
            else:
                self._completed.append((pending, result))
        self._settle_completed()

    def _should_retry(self, pending: _PendingCall, result: CallResult) -> bool:
        """Count a completed call; if it failed and has a retry left, use one up."""
        self._counts.calls += 1
        self._counts.call_s += result.seconds
        self._counts.max_call_s = max(self._counts.max_call_s, result.seconds)
        if not pending.retries_left or not any(outcome.failure for outcome in result.outcomes):
            return False
        self._counts.retried += 1
        pending.retries_left -= 1
        return True

    def _settle_completed(self) -> None:
        completed, self._completed = self._completed, []
        if self.cache is not None:
            known = [(pending.key, result.outcomes) for pending, result in completed if pending.key is not None]
            if known:
                self.cache.put(known)
        for pending, result in completed:
            self._settle(pending.call.function, pending.samples, result.outcomes)

    def _settle(self, function: int, samples: Sequence[_Sample], outcomes: Sequence[Outcome]) -> None:
        facts = self._calls.facts
        for sample, outcome in zip(samples, outcomes, strict=True):
            sample.outcomes[function] = outcome
            if all(sample.outcomes):  # an Outcome is truthy, whatever it says
                self._num_open -= 1
                self._unpolled.append(_combine(sample, facts))


def _combine(sample: _Sample, facts: Sequence[FunctionFacts]) -> RewardResult:
    """The result of all functions: the weighted sum of those with an opinion; if one fails, the result is a failure.

    Parts of a combination: each function's own reward under its name, its parts as NAME.PART, and ``accuracy``, which
    evaluation reads, from the first function that gives one.
    """
    outcomes = [outcome for outcome in sample.outcomes if outcome is not None]
    if len(outcomes) == 1 and outcomes[0].reward is not None and not facts[0].name:  # its weight is 1
        return RewardResult(sample.uid, sample.index, facts[0].weight * outcomes[0].reward, outcomes[0].parts)
    failure = next((outcome.failure for outcome in outcomes if outcome.failure), None)
    pairs = [(one, outcome) for one, outcome in zip(facts, outcomes, strict=True) if outcome.reward is not None]
    if failure is None and not pairs:
        failure = "none: no function of the reward gave a result"
    if failure is not None:
        return RewardResult(sample.uid, sample.index, None, {}, failure)
    parts: dict[str, float] = {}
    total = 0.0
    for one, outcome in pairs:
        assert outcome.reward is not None
        total += one.weight * outcome.reward
        if not one.name:
            parts |= outcome.parts
            continue
        parts[one.name] = outcome.reward
        for name, value in outcome.parts.items():
            if name == "accuracy":
                parts.setdefault("accuracy", value)
            else:
                parts[f"{one.name}.{name}"] = value
    if not math.isfinite(total):
        return RewardResult(sample.uid, sample.index, None, {}, f"reward_error: the weighted sum is {total}")
    return RewardResult(sample.uid, sample.index, total, parts)


class InlineScorer(RewardScorer):
    """Calls one ``function`` at submission, in this process: for rewards that take microseconds."""

    def __init__(self, function: RewardFunction, decode: Decode) -> None:
        loaded = LoadedFunction(FunctionSpec(function=function), RewardConfig())
        super().__init__(InlineCalls([loaded]), decode)


def failure_kind(failure: str) -> str:
    """``timeout`` from ``timeout: no result within 30 s``: failures are counted by kind."""
    return failure.partition(":")[0]


def make_decode(tokenizer: Any, end_ids: Sequence[int]) -> Decode:
    """Token ids to text without stop and padding tokens; other special tokens, ``<think>`` for one, are text."""
    dropped = frozenset(end_ids) | frozenset(filter(lambda pad: pad is not None, [tokenizer.pad_token_id]))

    def decode(parts: Sequence[np.ndarray]) -> str:
        ids = [token for token in chain.from_iterable(part.tolist() for part in parts) if token not in dropped]
        return tokenizer.decode(ids, skip_special_tokens=False)

    return decode

"""Judging finished samples: turns tokens into text, has the reward called, and makes every outcome a counted fact.

``collect`` and ``evaluate`` submit samples and poll verdicts; a verdict is a number or a named failure, never a
silent zero. :class:`RewardScorer` puts together what the reward's functions say: it holds a sample back until its group
is whole where a function judges groups, asks the cache, has failed calls tried again, and adds weighted parts. Where
the functions run, in this process or in workers, is the business of ``rewards.worker_pool``.

Training and evaluation each have a scorer of their own on the same workers, so their verdicts never mix. One thread
uses a scorer, the run's main one; results reach it through a queue.
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
CHECK_S = 1.0  # while waiting, how often to look whether the workers still work


@dataclass(frozen=True, slots=True)
class RewardResult:
    """``reward`` is None exactly where ``failure`` says why."""

    uid: str
    index: int
    reward: float | None
    parts: Mapping[str, float]
    failure: str | None = None


@dataclass(kw_only=True, slots=True)
class ScoringCounts:
    """What scoring cost since the last look."""

    calls: int = 0  # of a function, those from the cache left out
    call_s: float = 0.0  # their sum, from the start of each to its result
    max_call_s: float = 0.0
    retried: int = 0  # calls that failed and were made again
    cache_lookups: int = 0
    cache_hits: int = 0
    replaced_workers: int = 0


class Scorer(Protocol):
    def submit(self, prompt: Prompt, index: int, parts: Sequence[np.ndarray], finish_reason: str) -> None:
        """``parts``: i32[...] each, the response's tokens in order."""

    def poll(self) -> Sequence[RewardResult]:
        """Verdicts that arrived since the last call; never blocks."""

    @property
    def num_pending(self) -> int:
        """Samples submitted whose verdict was not polled yet."""

    def wait(self, timeout_s: float) -> None:
        """Block until a verdict can be polled, at most ``timeout_s``."""

    def drain(self, timeout_s: float) -> bool:
        """Block until every verdict that can come without further submissions can be polled; False: not in time.

        Samples whose group is not whole yet are not waited for. Verdicts arrive in any order; they carry ``uid`` and
        ``index`` for a caller that wants one.
        """

    def forget(self) -> None:
        """Samples submitted whose verdict was not polled yet never get one, and no longer count."""

    def close(self) -> None: ...


@dataclass(slots=True)
class _Sample:
    """A sample between its submission and its verdict."""

    uid: str
    index: int
    response: Response
    outcomes: list[Outcome | None]  # by function; None: not asked yet, or not answered


@dataclass(slots=True)
class _Asked:
    """A call under way: whose it is, and how often it may still be made again."""

    samples: list[_Sample]
    call: Call
    key: str | None
    retries_left: int


class RewardScorer:
    """See the module docstring.

    Args:
        decode: the response's token ids to text, end token left out.
        group_size: samples of a prompt, for functions that judge groups.
        retries: how often a failed call is made again before its failure counts.
        cache: of verdicts; None: off.
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
        self._judge_groups = False
        self._read_answers = False
        self._verdicts: list[RewardResult] = []
        self._num_open = 0  # samples without a verdict yet
        self._held: dict[str, list[_Sample]] = {}  # by uid, until the group is whole
        self._asked: dict[int, _Asked] = {}  # by a number of ours
        self._answered: list[tuple[_Asked, CallResult]] = []  # calls answered at once, until the submission ends
        self._next_number = 0
        self._results: SimpleQueue[tuple[int, CallResult]] = SimpleQueue()
        self._counts = ScoringCounts()

    # ---- the protocol ----------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, index: int, parts: Sequence[np.ndarray], finish_reason: str) -> None:
        facts = self._calls.facts
        kept: tuple[int, ...] = ()
        if self._take_tokens is None:  # known as soon as the functions are
            self._take_tokens = any(one.takes_tokens for one in facts)
            self._judge_groups = any(one.per_group for one in facts)
            self._read_answers = any(one.text == "answer" for one in facts)
        if self._take_tokens:
            kept = tuple(chain.from_iterable(part.tolist() for part in parts))
        response = Response(self._decode(parts), finish_reason, kept)
        sample = _Sample(prompt.uid, index, response, [None] * len(facts))
        self._num_open += 1
        opens_thought = self._read_answers and self._opens_thought(prompt)
        question = Question(prompt.text, prompt.reference, dict(prompt.columns), opens_thought)
        group = self._complete_group(sample) if self._judge_groups else []
        for number, one in enumerate(facts):
            if not one.per_group:
                self._ask(number, one, question, [sample])
            elif group:
                self._ask(number, one, question, group)
        self._settle_answered()

    def poll(self) -> Sequence[RewardResult]:
        self._take_in()
        verdicts, self._verdicts = self._verdicts, []
        return verdicts

    @property
    def num_pending(self) -> int:
        return self._num_open + len(self._verdicts)

    def wait(self, timeout_s: float) -> None:
        self._wait(timeout_s, lambda: bool(self._verdicts))

    def drain(self, timeout_s: float) -> bool:
        return self._wait(timeout_s, lambda: not self._asked)

    def forget(self) -> None:
        self._asked.clear()
        self._held.clear()
        self._verdicts.clear()
        self._num_open = 0

    def close(self) -> None:
        """Whose verdicts are still pending is forgotten; the workers are closed by whoever started them."""
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

    def _ask(self, function: int, facts: FunctionFacts, question: Question, samples: list[_Sample]) -> None:
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
        self._make(_Asked(samples, call, key, self._retries))

    def _make(self, asked: _Asked) -> None:
        number = self._next_number
        self._next_number += 1
        while True:
            result = self._calls.submit(asked.call, number, self._results.put)
            if result is None:
                self._asked[number] = asked
                return
            if not self._is_to_be_made_again(asked, result):
                self._answered.append((asked, result))
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
            asked = self._asked.pop(number, None)
            if asked is None:  # forgotten
                continue
            if self._is_to_be_made_again(asked, result):
                self._make(asked)
            else:
                self._answered.append((asked, result))
        self._settle_answered()

    def _is_to_be_made_again(self, asked: _Asked, result: CallResult) -> bool:
        """Counts a call that was answered; where it failed, one of the tries left is used up."""
        self._counts.calls += 1
        self._counts.call_s += result.seconds
        self._counts.max_call_s = max(self._counts.max_call_s, result.seconds)
        if not asked.retries_left or not any(outcome.failure for outcome in result.outcomes):
            return False
        self._counts.retried += 1
        asked.retries_left -= 1
        return True

    def _settle_answered(self) -> None:
        answered, self._answered = self._answered, []
        if self.cache is not None:
            known = [(asked.key, result.outcomes) for asked, result in answered if asked.key is not None]
            if known:
                self.cache.put(known)
        for asked, result in answered:
            self._settle(asked.call.function, asked.samples, result.outcomes)

    def _settle(self, function: int, samples: Sequence[_Sample], outcomes: Sequence[Outcome]) -> None:
        facts = self._calls.facts
        for sample, outcome in zip(samples, outcomes, strict=True):
            sample.outcomes[function] = outcome
            if all(sample.outcomes):  # an outcome is true whatever it says
                self._num_open -= 1
                self._verdicts.append(_combine(sample, facts))


def _combine(sample: _Sample, facts: Sequence[FunctionFacts]) -> RewardResult:
    """The verdict of all functions: the weighted sum of those with an opinion; a failure of one is a failure.

    Parts of a combination: each function's own reward under its name, its parts as NAME.PART, and ``accuracy``, which
    evaluation reads, of the first function that gives one.
    """
    outcomes = [outcome for outcome in sample.outcomes if outcome is not None]
    if len(outcomes) == 1 and outcomes[0].reward is not None and not facts[0].name:  # its weight is 1
        return RewardResult(sample.uid, sample.index, facts[0].weight * outcomes[0].reward, outcomes[0].parts)
    failure = next((outcome.failure for outcome in outcomes if outcome.failure), None)
    pairs = [(one, outcome) for one, outcome in zip(facts, outcomes, strict=True) if outcome.reward is not None]
    if failure is None and not pairs:
        failure = "none: no function of the reward gave a verdict"
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
    """``timeout`` of ``timeout: no verdict within 30 s``: what failures are counted by."""
    return failure.partition(":")[0]


def make_decode(tokenizer: Any, end_ids: Sequence[int]) -> Decode:
    """Token ids to text without stop and padding tokens; other special tokens, ``<think>`` for one, are text."""
    dropped = frozenset(end_ids) | frozenset(filter(lambda pad: pad is not None, [tokenizer.pad_token_id]))

    def decode(parts: Sequence[np.ndarray]) -> str:
        ids = [token for token in chain.from_iterable(part.tolist() for part in parts) if token not in dropped]
        return tokenizer.decode(ids, skip_special_tokens=False)

    return decode

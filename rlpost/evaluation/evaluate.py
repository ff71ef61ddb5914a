"""Evaluation: k responses to each held-out prompt, scored by the recipe's reward.

Owns mean@k and pass@k with their intervals. Same seeds at every evaluation, so that differences pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlpost.config import EvalConfig
from rlpost.engine.protocol import Engine, EngineWork, Request, SamplingSettings
from rlpost.errors import RunError, explain
from rlpost.evaluation.intervals import Interval, bootstrap_mean, pass_at_k
from rlpost.rewards.scoring import Scorer, Verdict, failure_kind
from rlpost.rollout.collect import SCORE_POLL_S, sample_seed
from rlpost.types import Prompt, Sample, Segment

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """``correct`` is f64[problems]: the share of each problem's judged responses that were right."""

    correct: np.ndarray
    problems: tuple[str, ...]  # uid of each problem in ``correct``
    accuracy: Interval  # mean@k
    pass_at: dict[int, Interval]  # pass@k for k = 1, 2, 4, ... and samples_per_prompt
    samples_per_prompt: int
    num_samples: int
    failures: dict[str, int]  # responses without a verdict, left out of the means, by kind
    mean_response_tokens: float
    truncated_share: float
    parts: dict[str, float]  # mean of each reward part
    samples: tuple[tuple[Prompt, Sample], ...]
    work: EngineWork  # its tail, with few samples running, is what tells a step's fixed cost from a sample's

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())

    def metrics(self) -> dict[str, float]:
        best = self.pass_at[max(self.pass_at)]
        return {
            "eval/accuracy": self.accuracy.mean,
            "eval/accuracy_low": self.accuracy.low,
            "eval/accuracy_high": self.accuracy.high,
            "eval/pass_at_k": best.mean,
            "eval/pass_at_k_low": best.low,
            "eval/pass_at_k_high": best.high,
            "eval/response_tokens": self.mean_response_tokens,
            "eval/truncated_share": self.truncated_share,
            "eval/num_samples": self.num_samples,
            "eval/num_failed": self.num_failed,
            **{f"eval/failed/{kind}": count for kind, count in self.failures.items()},
            **{f"eval/part/{name}": value for name, value in self.parts.items()},
        }


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    cfg: EvalConfig,
    *,
    max_response_tokens: int,
    sampling: SamplingSettings,
    seed: int,
    policy_version: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Generate and judge ``cfg.samples_per_prompt`` responses per prompt; ``on_progress(finished, wanted)``."""
    scorer.forget()  # of an evaluation whose workers were lost in the middle, which this one makes again
    k = cfg.samples_per_prompt
    by_uid = {p.uid: p for p in prompts}
    queue = [(p, i) for i in range(k) for p in prompts]
    wanted = len(queue)
    tokens: dict[str, list[np.ndarray]] = {}
    logprobs: dict[str, list[np.ndarray]] = {}
    finish: dict[str, str] = {}
    verdicts: list[Verdict] = []
    work = EngineWork()
    position = 0
    while position < len(queue) or engine.num_in_flight:
        iteration_started = engine.now()
        free = engine.max_slots + engine.reserve - engine.num_in_flight
        batch = queue[position : position + free]
        position += len(batch)
        if batch:
            engine.submit([_request(p, i, max_response_tokens, seed, sampling) for p, i in batch])
        result = engine.step()
        for delta in result.deltas:
            tokens.setdefault(delta.request_id, []).append(delta.token_ids)
            logprobs.setdefault(delta.request_id, []).append(delta.logprobs)
            if delta.finish_reason:
                finish[delta.request_id] = delta.finish_reason
                uid, _, index = delta.request_id.rpartition("/")
                scorer.submit(by_uid[uid], int(index), tokens[delta.request_id], delta.finish_reason)
        for delta in result.returned:  # its replica was lost: it is made again, with the same seed
            uid, _, index = delta.request_id.rpartition("/")
            queue.append((by_uid[uid], int(index)))
            tokens.pop(delta.request_id, None)
            logprobs.pop(delta.request_id, None)
        verdicts += scorer.poll()
        work.add_step(engine.now() - iteration_started, result)
        if on_progress is not None:
            on_progress(len(finish), wanted)
    while len(verdicts) < wanted:
        scorer.wait(SCORE_POLL_S)
        verdicts += scorer.poll()
        if on_progress is not None:
            on_progress(len(finish), wanted)

    def as_sample(v: Verdict) -> Sample:
        request_id = f"{v.uid}/{v.index}"
        segment = Segment(
            token_ids=np.concatenate(tokens[request_id]),
            rollout_logprobs=np.concatenate(logprobs[request_id]),
            policy_version=policy_version,
        )
        return Sample(
            uid=v.uid,
            index=v.index,
            segments=(segment,),
            finish_reason=finish[request_id],
            reward=v.reward,
            reward_parts=v.parts,
            failure=v.failure,
        )

    order = {p.uid: n for n, p in enumerate(prompts)}
    judged = sorted(verdicts, key=lambda v: (order[v.uid], v.index))
    return summarize([(by_uid[v.uid], as_sample(v)) for v in judged], cfg, work)


def summarize(samples: Sequence[tuple[Prompt, Sample]], cfg: EvalConfig, work: EngineWork) -> EvalResult:
    """Means over problems of means over their judged samples.

    Raises:
        RunError: not one response could be judged.
    """
    by_problem: dict[str, list[bool]] = {}
    parts: dict[str, list[float]] = {}
    for _, sample in samples:
        if sample.reward is not None:
            score = sample.reward_parts.get("accuracy", sample.reward)
            by_problem.setdefault(sample.uid, []).append(score > cfg.threshold)
            for name, value in sample.reward_parts.items():
                parts.setdefault(name, []).append(value)
    if not by_problem:
        failure = samples[0][1].failure if samples else "no evaluation prompts"
        raise RunError(explain("evaluation: judged responses", 0, "at least one", f"mend the reward ({failure})"))
    outcomes = list(by_problem.values())
    correct = np.array([np.mean(o) for o in outcomes])
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < cfg.samples_per_prompt} | {cfg.samples_per_prompt})
    whole = [o for o in outcomes if len(o) == cfg.samples_per_prompt] or outcomes  # without failed responses
    pass_at = {k: bootstrap_mean(np.array([pass_at_k(len(o), sum(o), min(k, len(o))) for o in whole])) for k in ks}
    lengths = [s.num_tokens for _, s in samples]
    return EvalResult(
        correct=correct,
        problems=tuple(by_problem),
        accuracy=bootstrap_mean(correct),
        pass_at=pass_at,
        samples_per_prompt=cfg.samples_per_prompt,
        num_samples=len(samples),
        failures=dict(Counter(failure_kind(s.failure) for _, s in samples if s.failure is not None)),
        mean_response_tokens=float(np.mean(lengths)),
        truncated_share=float(np.mean([s.finish_reason == "length" for _, s in samples])),
        parts={name: float(np.mean(values)) for name, values in parts.items()},
        samples=tuple(samples),
        work=work,
    )


def _request(prompt: Prompt, index: int, limit: int, seed: int, sampling: SamplingSettings) -> Request:
    return Request(
        request_id=f"{prompt.uid}/{index}",
        parts=(prompt.token_ids,),
        max_new_tokens=limit,
        seed=sample_seed(seed, f"eval:{prompt.uid}", index, 0),
        sampling=sampling,
    )

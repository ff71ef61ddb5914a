"""Evaluation: k responses to each held-out prompt, scored by the recipe's reward.

Owns mean@k and pass@k with their intervals. Every evaluation uses the same seeds, so that differences are paired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rlpost.config import EvalConfig
from rlpost.engine.protocol import Engine, EngineWork, SamplingSettings
from rlpost.errors import RunError, explain
from rlpost.evaluation.intervals import Interval, bootstrap_mean, pass_at_k
from rlpost.rewards.scoring import Scorer, failure_kind
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectProgress, CollectSettings, collect
from rlpost.rollout.strategy import ROUND_ROBIN, RolloutStrategy
from rlpost.types import Prompt, Sample, source_of


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """``correct`` is f64[problems]: the share of each problem's scored responses that were correct."""

    correct: np.ndarray
    problems: tuple[str, ...]  # uid of each problem in ``correct``
    accuracy: Interval  # mean@k
    pass_at: dict[int, Interval]  # pass@k for k = 1, 2, 4, ... and samples_per_prompt
    samples_per_prompt: int
    num_samples: int
    failures: dict[str, int]  # responses without a reward, left out of the means, by kind
    mean_response_tokens: float
    truncated_share: float
    parts: dict[str, float]  # mean of each reward part
    samples: tuple[tuple[Prompt, Sample], ...]
    work: EngineWork  # its tail, with few samples running, separates a step's fixed cost from the cost per sample
    by_source: dict[str, EvalResult] = field(default_factory=dict)  # where data.eval has several sources

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())

    def metrics(self) -> dict[str, float]:
        """``eval/`` of all problems, and ``eval/NAME/`` of each source's where there are several."""
        metrics = self._figures()
        metrics |= {f"eval/failed/{kind}": count for kind, count in self.failures.items()}
        metrics |= {f"eval/part/{name}": value for name, value in self.parts.items()}
        for name, result in self.by_source.items():
            figures = result._figures()
            metrics |= {f"eval/{name}/{key.removeprefix('eval/')}": value for key, value in figures.items()}
        return metrics

    def _figures(self) -> dict[str, float]:
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
    should_stop: Callable[[], bool] = lambda: False,
) -> EvalResult | None:
    """Generate and score ``cfg.samples_per_prompt`` responses per prompt; None if ``should_stop`` ended it early.

    One synchronous rollout whose groups are the problems; nothing is carried over, rejected or recorded. The first
    response to every problem is started first, then the second ones. ``on_progress(finished, wanted)``: responses.
    """
    scorer.forget()  # results of an earlier evaluation that lost its workers, which this one repeats
    strategy = RolloutStrategy(
        groups_per_step=len(prompts), samples_per_group=cfg.samples_per_prompt, order=ROUND_ROBIN
    )
    buffer = RolloutBuffer(strategy)
    for prompt in prompts:
        buffer.add(prompt)
    settings = CollectSettings(
        max_in_flight=engine.max_slots,
        max_response_tokens=max_response_tokens,
        sampling=sampling,
        seed=seed,
        seed_scope="eval:",
        max_filtered_groups=1,
        reject=lambda group: None,
        drop_failed=False,
    )

    def report(progress: CollectProgress) -> None:
        if on_progress is not None:
            on_progress(progress.finished, strategy.samples_per_step)

    stats = collect(
        engine,
        buffer,
        iter(()),
        scorer,
        settings,
        step=policy_version,
        on_progress=report,
        should_stop=should_stop,
    )
    if stats.stopped:
        return None
    groups = sorted(buffer.admitted, key=lambda group: group.order)
    samples = [(g.prompt, sample) for g in groups for sample in g.freeze().samples]
    by_source: dict[str, list[tuple[Prompt, Sample]]] = {}
    for prompt, sample in samples:
        by_source.setdefault(source_of(prompt.uid), []).append((prompt, sample))
    named = {name: summarize(own, cfg, stats.work) for name, own in by_source.items() if name}
    return replace(summarize(samples, cfg, stats.work), by_source=named)


def summarize(samples: Sequence[tuple[Prompt, Sample]], cfg: EvalConfig, work: EngineWork) -> EvalResult:
    """Means over problems of means over their scored samples.

    Raises:
        RunError: no response could be scored.
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
        raise RunError(explain("evaluation: scored responses", 0, "at least one", f"fix the reward ({failure})"))
    outcomes = list(by_problem.values())
    correct = np.array([np.mean(o) for o in outcomes])
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < cfg.samples_per_prompt} | {cfg.samples_per_prompt})
    whole = [o for o in outcomes if len(o) == cfg.samples_per_prompt] or outcomes  # problems without failed responses
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

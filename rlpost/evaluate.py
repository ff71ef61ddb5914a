"""Evaluating a session on held-out problems: with a running engine, or as the command ``rlpost eval``.

``run`` calls :func:`evaluate_session`; :func:`run_eval` is the command, which needs no trainer. ``evaluation`` owns
what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rlpost.config import Config
from rlpost.engine.protocol import Engine, SamplingSettings
from rlpost.evaluation.evaluate import EvalResult, evaluate
from rlpost.evaluation.intervals import Interval

if TYPE_CHECKING:
    from rlpost.reporting.progress import Progress
    from rlpost.session import Session


def evaluate_session(
    session: Session,
    engine: Engine,
    *,
    policy_version: int,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvalResult | None:
    """:func:`evaluate` on the session's evaluation problems, as configured; None if it was stopped."""
    cfg = session.cfg
    return evaluate(
        engine,
        session.eval_prompts,
        session.eval_scorer,
        cfg.eval,
        max_response_tokens=session.eval_response_tokens,
        sampling=eval_sampling(cfg, session.stop_token_ids),
        seed=cfg.seed,
        policy_version=policy_version,
        on_progress=on_progress,
        should_stop=should_stop,
    )


def eval_sampling(cfg: Config, stop_token_ids: Sequence[int]) -> SamplingSettings:
    return SamplingSettings(
        temperature=cfg.eval.temperature, top_p=cfg.eval.top_p, stop_token_ids=tuple(stop_token_ids)
    )


def run_eval(cfg: Config) -> EvalResult:
    """``rlpost eval``: the model in its folder, on the engine alone; prints mean@k and pass@k."""
    from rlpost.reporting.progress import Progress
    from rlpost.session import open_session

    session = open_session(cfg, train=False)
    try:
        with Progress(cfg.logging.progress) as progress:
            progress.phase("start")
            session.open_result_cache(None, progress.message)
            result = _evaluate_model(session, progress)
    finally:
        session.close()
    print(describe(result, session.model_folder), flush=True)
    return result


def _evaluate_model(session: Session, progress: Progress) -> EvalResult:
    from rlpost.engine.vllm import build_engine

    cfg = session.cfg
    engine = build_engine(
        cfg,
        model_folder=session.model_folder,
        max_model_len=session.max_model_len,
    )
    try:
        progress.phase("eval")
        result = evaluate_session(session, engine, policy_version=0, on_progress=progress.evaluating)
        assert result is not None, "nothing asks it to stop"
        return result
    finally:
        engine.shutdown()


def describe(result: EvalResult, model: str) -> str:
    """A readable summary: mean@k, pass@k for powers of two up to k, lengths, failures."""
    lines = [
        f"model     {model}",
        f"problems  {len(result.correct)}, {result.samples_per_prompt} responses each, {result.num_samples} in all",
        f"mean@{result.samples_per_prompt}    {_percent(result.accuracy)}",
        *(f"pass@{k}    {_percent(interval)}" for k, interval in result.pass_at.items()),
        f"length    {result.mean_response_tokens:.1f} tokens, {100 * result.truncated_share:.1f} % cut at the limit",
    ]
    lines += [
        f"{name:<8}  {_percent(own.accuracy)}, {len(own.correct)} problems" for name, own in result.by_source.items()
    ]
    if result.num_failed:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result.failures.items()))
        lines.append(f"failed    {result.num_failed} responses could not be scored and are left out ({kinds})")
    return "\n".join(lines)


def _percent(value: Interval) -> str:
    return f"{100 * value.mean:.1f} % (95 % interval {100 * value.low:.1f} to {100 * value.high:.1f}, over problems)"

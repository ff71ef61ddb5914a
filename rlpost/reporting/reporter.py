"""Everything a run reports while it runs, behind one object: the loop names what happens, not who is told.

:class:`Reporter` owns metrics and trackers, the timeline, ``status.json``, the display, the advice, the watchdog, and
the stopwatch that divides a step's time into parts. It decides nothing and changes nothing in a run. ``run`` creates
and closes it; ``loop``, ``run`` and the workers' recovery call it, from one thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlpost.config import Config
from rlpost.durable.run_record import iteration_sums
from rlpost.evaluation.evaluate import EvalResult
from rlpost.reporting import timeline
from rlpost.reporting.advice import Adviser, Facts, WarningsFile
from rlpost.reporting.metrics import MetricsWriter, read_steps
from rlpost.reporting.progress import Progress
from rlpost.reporting.rollout_files import Decode
from rlpost.reporting.status import StatusFile
from rlpost.reporting.step_metrics import (
    reward_metrics,
    rollout_metrics,
    scoring_metrics,
    step_histograms,
    update_metrics,
)
from rlpost.reporting.waterfall import Stopwatch, of_publication, of_rollout, waterfall
from rlpost.rewards.scoring import RewardScorer, ScoringCounts
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectProgress
from rlpost.rollout.stats import RolloutStats
from rlpost.train.update_policy import SKIPPED, Update
from rlpost.types import Group
from rlpost.workers.publication import Publication
from rlpost.workers.watchdog import Watchdog

EMPTY_RESPONSE_TOKENS = 1  # an empty text still has its end token


class Reporter:
    """The reporter of one run; ``step`` counts finished steps.

    Args:
        run_dir: exists and is writable.
        progress: the display, which outlives a run that restarts.
        facts: what the advice needs to know about configuration and data; None: no advice, which is about RL.
        decode: token ids to text, for rollout files.
    """

    def __init__(self, cfg: Config, run_dir: Path, *, progress: Progress, facts: Facts | None, decode: Decode) -> None:
        self.step = 0
        self._cfg, self._run_dir, self._progress = cfg, run_dir, progress
        self._watchdog = Watchdog(cfg.watchdog_s)
        self._metrics = MetricsWriter(
            run_dir,
            cfg.logging,
            asdict(cfg),
            run_dir.name,
            decode=decode,
            say=progress.message,
            split_times=cfg.deterministic,
        )
        self._timeline = timeline.TimelineWriter(run_dir, self._metrics.now_s)
        self._status = StatusFile(run_dir, steps=cfg.steps, say=progress.message)
        self._adviser = Adviser(facts) if facts is not None else None
        self._warnings = WarningsFile(run_dir)
        self._stopwatch = Stopwatch()
        self._engine_clock: Callable[[], float] = time.perf_counter
        self._explained_open_limit = 0
        self._account = _StepAccount()

    # ---- events ---------------------------------------------------------------------------------------------

    def message(self, text: str) -> None:
        """A line for the user."""
        self._progress.message(text)

    def phase(self, name: str) -> None:
        """A new phase begins; see ``progress.PHASES``."""
        self._watchdog.beat(name)
        self._progress.phase(name)
        self._status.phase(name, self.step)
        done = self.step == self._cfg.steps or name in ("eval", "save")  # otherwise it is part of the next step
        self._timeline.phase(name, self.step if done else self.step + 1)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time inside the context counts for this part of the step (``waterfall.PARTS``); entering it is progress."""
        self._watchdog.beat()
        with self._stopwatch.part(name):
            yield

    def waiting(self) -> None:
        """The run is waiting for workers."""
        self._watchdog.beat()
        self._status.tick()

    def rollout_progress(self, progress: CollectProgress) -> None:
        admitted, running, open_groups, _ = progress
        wanted = self._cfg.rollout.groups_per_step
        self._watchdog.beat()
        self._progress.rollout(admitted, wanted, running, open_groups)
        left_s = self._progress.left_s()
        self._status.progress(admitted, wanted, running=running, open_groups=open_groups, left_s=left_s)

    def evaluation_progress(self, finished: int, wanted: int) -> None:
        """Responses finished in an evaluation."""
        self._watchdog.beat()
        self._progress.evaluating(finished, wanted)
        self._status.progress(finished, wanted, left_s=self._progress.left_s())

    # ---- start and end --------------------------------------------------------------------------------------

    def follow(self, *, workers: Callable[[], list[dict[str, Any]]], engine_clock: Callable[[], float]) -> None:
        """From now on the status shows the workers, and rollout times are on this clock."""
        self._status.workers = workers
        self._engine_clock = engine_clock

    def resume(self, step: int | None, *, evaluated_step: int) -> None:
        """Drop what was logged after ``step``, which the run repeats; None: a new run, nothing is kept."""
        self.step = step or 0
        self._timeline.rewind(self._metrics.rewind(step, evaluated_step=evaluated_step))
        given = self._warnings.rewind(step)
        if self._adviser is not None:
            self._adviser.recall(read_steps(self._run_dir), given)
            self._advise()

    def start(self, evals_left: int) -> None:
        self._progress.start(self._cfg.steps, first_step=self.step, evals_left=evals_left)

    def end(self, state: str, reason: str = "") -> None:
        """The run is finished, stopped (saved, on request) or failed."""
        self._status.end(state, reason)
        if state == "failed":
            self._metrics.alert("the run failed", reason)

    def print_closing(self, table: str) -> None:
        self._timeline.log(self.step)
        self._progress.close()
        print(table, flush=True)

    def close(self, *, failed: bool) -> None:
        self._timeline.close()
        self._warnings.close()
        self._metrics.keep_files("timeline", [self._run_dir / timeline.FILE])
        self._metrics.close(failed=failed)
        self._watchdog.close()

    # ---- a step ---------------------------------------------------------------------------------------------

    def begin_step(self, publication: Publication) -> None:
        """The publication that was just made is the step's first part."""
        self._stopwatch.take()  # earlier time belongs to no step
        self._account = _StepAccount(publication)

    def rollout(self, stats: RolloutStats, *, ledger_s: float) -> None:
        """Generation is done. ``ledger_s``: seconds it spent on the ledger."""
        self._account.lap("generate")
        self._account.ledger_s = ledger_s
        self._account.parts = of_rollout(stats, ledger_s) | {"ledger": ledger_s}
        self._timeline.phase("ledger", self.step + 1)

    def stored(self) -> None:
        self._account.lap("store")

    def updated(self) -> None:
        """The update is done, and with it the step; its bookkeeping follows."""
        self._account.lap("update")
        self.step += 1

    def partial_rollout(self, stats: RolloutStats) -> None:
        """A rollout ended before its step did: on a stop request, or because the last replica was lost."""
        self._log_rollout_timeline(stats)

    def open_limit(self, buffer: RolloutBuffer) -> None:
        """Explain the limit on open groups if it was chosen again."""
        limit, reason = buffer.schedule.max_open, buffer.schedule.open_limit_reason
        if limit != self._explained_open_limit and reason:
            self._explained_open_limit = limit
            self.message(f"step {self.step + 1}: up to {limit} groups open: {reason}")

    def step_metrics(
        self,
        groups: Sequence[Group],
        stats: RolloutStats,
        update: Update,
        *,
        buffer: RolloutBuffer,
        drawn_steps: Sequence[int],
        scorer: RewardScorer,
    ) -> dict[str, float]:
        """The metrics of the step just settled; writes its rollouts and reports what went wrong in it.

        drawn_steps: when each of ``groups`` was drawn.
        """
        for reason, count in Counter(update.failed.values()).items():
            self.message(f"step {self.step}: {count} of {len(groups)} groups {SKIPPED[reason]}; nothing was applied")
        if stats.num_failed_rewards:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(stats.failures.items()))
            self.message(
                f"step {self.step}: {stats.num_failed_rewards} of {stats.num_scored} rewards failed ({kinds}); "
                f"the last one: {stats.last_failure}"
            )
        publication = self._account.known_publication
        metrics = (
            reward_metrics(groups, stats)
            | scoring_metrics(scorer.take_counts(), scorer.num_pending)
            | rollout_metrics(groups, stats, buffer, drawn_steps, empty_ids=EMPTY_RESPONSE_TOKENS)
            | update_metrics(update.results, update.batches, publication)
        )
        self._timeline.phase("log", self.step)
        self._metrics.log_rollouts(self.step, groups, update.advantages, update.old_logprobs)
        self._metrics.log_histograms(
            self.step, step_histograms(groups, update.advantages, policy_version=publication.policy_version)
        )
        trained = [group.uid for group in groups if group.uid not in update.failed]
        failed = [(uid, f"failed[{reason}]") for uid, reason in update.failed.items()]
        self._log_rollout_timeline(stats, admitted=trained, failed=failed)
        return metrics

    def step_done(self, metrics: Mapping[str, float], *, ledger_s: float) -> None:
        """The step is complete. ``ledger_s``: seconds spent on the ledger since :meth:`rollout`."""
        account, publication = self._account, self._account.known_publication
        times = account.times(ledger_s)
        parts = waterfall(times["step"], of_publication(publication), account.parts, self._stopwatch.take())
        metrics = {**metrics, **parts, **{f"time/{name}": seconds for name, seconds in times.items()}}
        self._metrics.log(self.step, metrics)
        self._progress.step_done(self.step, metrics)
        self._advise(metrics)

    def supervised_step(self, metrics: Mapping[str, float]) -> None:
        """A step of supervised training is complete; it is one update and has no parts but that."""
        self.step += 1
        self._timeline.phase("log", self.step)
        self._metrics.log(self.step, metrics)
        self._progress.step_done(self.step, metrics)

    # ---- between steps --------------------------------------------------------------------------------------

    def evaluation(self, result: EvalResult, counts: ScoringCounts, *, seconds: float) -> None:
        self._progress.evaluation(result.accuracy, {name: own.accuracy for name, own in result.by_source.items()})
        self._timeline.log(self.step, iterations={"phase": "eval"} | iteration_sums(result.work))
        self._metrics.log_evaluation(self.step, result.samples)
        cached = {"eval/cache_hit_share": counts.cache_hits / counts.cache_lookups} if counts.cache_lookups else {}
        self._metrics.log(self.step, result.metrics() | cached | {"time/eval": seconds})

    def loss_evaluation(self, metrics: Mapping[str, float], *, seconds: float) -> None:
        """The loss on held-out examples was measured."""
        self._progress.loss_evaluation(metrics["eval/loss"])
        self._metrics.log(self.step, {**metrics, "time/eval": seconds})

    def saved(self, *, seconds: float) -> None:
        self._timeline.log(self.step)
        self._metrics.log(self.step, {"time/save": seconds})

    def log(self, metrics: Mapping[str, float]) -> None:
        """Numbers that belong to no part of the loop."""
        self._metrics.log(self.step, metrics)

    # ---- private --------------------------------------------------------------------------------------------

    def _advise(self, metrics: Mapping[str, float] | None = None) -> None:
        """Give each warning once: in the display, in ``warnings.jsonl``, to the trackers."""
        for advice in self._adviser.look(metrics) if self._adviser is not None else ():
            self.message(f"warning: {advice.text}")
            self._warnings.append(self.step, advice)
            if advice.is_urgent:
                self._metrics.alert(advice.name, advice.text)

    def _log_rollout_timeline(
        self, stats: RolloutStats, *, admitted: Sequence[str] = (), failed: Sequence[tuple[str, str]] = ()
    ) -> None:
        self._timeline.log(
            stats.step + 1,
            spans={name: getattr(stats.spans, name) for name in timeline.COLUMNS},
            offset_s=self._metrics.now_s() - self._engine_clock(),
            admitted=admitted,
            dropped=[*stats.dropped, *failed],
            iterations={"phase": "generate"} | iteration_sums(stats.work),
        )


class _StepAccount:
    """Where the current step's time went, in seconds; ``parts`` are those of its generation."""

    def __init__(self, publication: Publication | None = None) -> None:
        self.publication = publication
        self.parts: dict[str, float] = {}
        self.ledger_s = 0.0
        self._laps: dict[str, float] = {}
        self._began = self._lap_began = time.perf_counter()
        self._cpu_began = time.process_time()

    @property
    def known_publication(self) -> Publication:
        assert self.publication is not None, "begin_step comes first"
        return self.publication

    def lap(self, name: str) -> None:
        """Everything since the last lap counts as ``name``."""
        now = time.perf_counter()
        self._laps[name], self._lap_began = now - self._lap_began, now

    def times(self, ledger_s: float) -> dict[str, float]:
        """The ``time/`` metrics; ``ledger_s`` is added to generation's own."""
        published = self.known_publication.duration_s
        return {
            "publish": published,
            "generate": self._laps["generate"],
            "ledger": self.ledger_s + ledger_s,
            "update": self._laps["update"],
            "step": published + time.perf_counter() - self._began,
            "cpu": time.process_time() - self._cpu_began,
        }

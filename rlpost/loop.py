"""The whole run on one screen: publish, generate, advantages, update, settle, save.

:func:`train` is what ``rlpost train`` calls. This is the only place where rollout and training meet; it owns the order
of things and the run's counters, and leaves every decision to the parts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rlpost.config import Config
from rlpost.config.compose import to_yaml
from rlpost.durable import run_dir
from rlpost.durable.history import History
from rlpost.durable.run_record import iteration_sums
from rlpost.durable.run_state import CONFIG_FILE, Found, RunState
from rlpost.durable.stopping import Stopped, StopRequest
from rlpost.errors import ShardsLost
from rlpost.evaluate import evaluate_session
from rlpost.prompts.cursor import PromptCursor, digest_prompts, draw_prompts
from rlpost.reporting import timeline
from rlpost.reporting.advice import Adviser, WarningsFile, facts_of
from rlpost.reporting.closing import closing_table, gather_facts, make_summary
from rlpost.reporting.metrics import MetricsWriter, read_steps
from rlpost.reporting.model_card import model_card
from rlpost.reporting.progress import Progress
from rlpost.reporting.status import StatusFile
from rlpost.reporting.step_metrics import (
    reward_metrics,
    rollout_metrics,
    scoring_metrics,
    step_histograms,
    update_metrics,
)
from rlpost.reporting.timeline import TimelineWriter
from rlpost.reporting.waterfall import Stopwatch, of_publication, of_rollout, waterfall
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings, collect
from rlpost.rollout.concurrency import samples_that_fit
from rlpost.rollout.lengths import LengthEstimate
from rlpost.rollout.stats import RolloutStats
from rlpost.session import Session, open_session
from rlpost.simulation.replay import compare_run
from rlpost.train.update_policy import SKIPPED, Update, check_mismatch, find_untrained
from rlpost.types import Group, TrainBatch
from rlpost.workers.local import start_worker
from rlpost.workers.protocol import Turns, Workers
from rlpost.workers.publication import Publication
from rlpost.workers.recovery import Recovery
from rlpost.workers.watchdog import Watchdog


def train(cfg: Config) -> dict[str, Any]:
    """Run ``cfg.steps`` steps, or those left of an unfinished run of this name; returns the run's summary.

    Where workers were lost and the state of the last finished step with them, the run begins another life from its
    last checkpoint, as a killed one would.
    """
    run: run_dir.RunDir | None = None
    reached = fruitless = 0
    while True:
        session = open_session(cfg)
        try:
            if run is None:
                run = run_dir.open_run_dir(cfg.runs_dir, str(cfg.name), resume=cfg.resume)
            with Progress(cfg.logging.progress) as progress:
                with StopRequest(cfg.checkpoint.stop_deadline_s, progress.stopping) as stop:
                    trainer = Trainer(session, run, progress, stop, reached=reached)
                    return trainer.run()
        except ShardsLost as lost:
            assert run is not None
            fruitless = fruitless + 1 if trainer.step <= reached else 0
            if fruitless > cfg.cluster.max_recoveries:
                raise
            reached = max(reached, trainer.step)
            print(f"{lost}; the run goes back to its last checkpoint", flush=True)
            run = run_dir.next_life(run)
        finally:
            session.close()


T = TypeVar("T")
LENGTHS_OF_STEPS = 16  # so many steps' prompts tell how long answers are: they drift with the policy over tens of steps
DETERMINISTIC_SCORE_EVERY = 8  # engine steps: waiting for verdicts at each one would stop generation for slow rewards


class Trainer:
    """One run's parts and counters. ``run()`` is the program."""

    def __init__(
        self, session: Session, run: run_dir.RunDir, progress: Progress, stop: StopRequest, *, reached: int = 0
    ) -> None:
        """Everything that needs no device; :meth:`run` starts the rest. ``reached``: steps that an earlier life, whose
        workers were lost, had finished."""
        cfg = session.cfg
        self.cfg, self.session, self.path, self.progress, self.stop = cfg, session, run.path, progress, stop
        self._start_from, self._reached = run.start_from, reached
        self._introduce(run)
        session.open_verdict_cache(run.path, progress.message)
        self.watchdog = Watchdog(cfg.watchdog_s)
        prompts = session.train_prompts.prompts
        cursor = PromptCursor(len(prompts), cfg.seed, cfg.data.shuffle, digest_prompts(prompts))
        self.prompts = draw_prompts(cursor, prompts)
        self.history = History()
        self.state = RunState(cfg, run.path, cursor, self.history, dtype=session.runtime.dtype, say=progress.message)
        self.metrics = MetricsWriter(
            run.path,
            cfg.logging,
            asdict(cfg),
            run.path.name,
            decode=session.tokenizer.decode,
            say=progress.message,
            split_times=cfg.deterministic,
        )
        self.timeline = TimelineWriter(run.path, self.metrics.now_s)
        self.status = StatusFile(run.path, steps=cfg.steps, say=progress.message)
        self.adviser = Adviser(facts_of(cfg, session.train_prompts.prompts, session.eval_prompts))
        self.warnings = WarningsFile(run.path)
        self.watch = Stopwatch()
        self._told_open_limit = 0  # the adaptive limit on open groups that was last explained

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def buffer(self) -> RolloutBuffer:
        return self.state.buffer

    def _introduce(self, run: run_dir.RunDir) -> None:
        runtime, num_dropped = self.session.runtime, self.session.train_prompts.num_dropped
        if run.note:
            self.progress.message(run.note)
        self.progress.message(
            f"device {runtime.device}, {runtime.dtype}, {runtime.threads} CPU thread(s), run in {run.path}"
        )
        if num_dropped:
            self.progress.message(f"{num_dropped} training prompts are too long and were left out")

    # ---- the program ----------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        worker: Workers | None = None
        finished = False
        try:
            found = self.state.recall(self._start_from)
            (self.path / CONFIG_FILE).write_text(to_yaml(self.cfg))
            worker = self._start()
            self._resume(found)
            if not self.cfg.deterministic:
                self.stop.wait_for_boundaries()
            self.progress.start(self.cfg.steps, first_step=self.step, evals_left=self._evals_left())
            while True:
                publication = self._surviving(self._publish)
                if self._eval_is_due(self.step):
                    self._surviving(self._evaluate)
                self._leave_if_stopped()
                if self.step >= self.cfg.steps:  # more than that where a finished part is resumed with fewer steps
                    break
                self._one_step(publication)
            self.stop.wait_for_boundaries()  # what is left is written in any case: a run that is finished stays so
            summary = self._close_run()
            finished = True
            self.status.end("finished")
            return summary
        except Stopped as stopped:
            self.status.end("stopped", str(stopped))
            raise
        except ShardsLost:
            raise  # the run is not over: another life begins
        except Exception as error:
            self.status.end("failed", str(error))
            self.metrics.alert("the run failed", str(error))
            raise
        finally:
            self.stop.wait_for_boundaries()
            self.timeline.close()
            self.warnings.close()
            self.metrics.keep_files("timeline", [self.path / timeline.FILE])
            self.metrics.close(failed=not finished)
            self.state.close()
            if worker is not None:
                worker.close()
            self.watchdog.close()

    def _start(self) -> Workers:
        """Trainer and engine, and what can only be made with them."""
        self._phase("start")
        from rlpost.algos.algorithm import build_algorithm

        cfg, session = self.cfg, self.session
        self.algorithm = build_algorithm(cfg)
        self.collect_settings = CollectSettings(
            max_in_flight=cfg.max_in_flight,
            max_response_tokens=cfg.rollout.max_response_tokens,
            sampling=session.sampling,
            seed=cfg.seed,
            max_filtered_groups=cfg.algo.max_filtered_groups,
            reject=self.algorithm.reject,
            max_failure_share=cfg.reward.max_failure_share,
            keep_kv=cfg.rollout.keep_kv,
            score_every=DETERMINISTIC_SCORE_EVERY if cfg.deterministic else 0,
        )
        settings = session.worker_settings(needs_reference=self.algorithm.needs_reference)
        if cfg.cluster.kind == "ray":
            from rlpost.workers.cluster.workers import start_cluster

            self.worker: Workers = start_cluster(settings, self.path, say=self.progress.message, beat=self._beat)
        else:
            self.worker = start_worker(settings)
        self.status.workers = self.worker.describe
        limit, say = cfg.cluster.max_recoveries, self.progress.message
        self.recovery = Recovery(self.worker, limit=limit, begin=self._phase, say=say, timed=self.watch.part)
        return self.worker

    @property
    def device(self) -> Turns:
        return self.worker.device

    def _surviving(self, call: Callable[[], T]) -> T:
        return self.recovery.surviving(self.step, call)

    def _on_trainer(self, call: Callable[[], T]) -> T:
        """``call()`` while the trainer has the device, whatever happens to workers."""

        def call_with_the_device() -> T:
            with self.device.training():
                return call()

        return self._surviving(call_with_the_device)

    def _one_step(self, publication: Publication) -> None:
        """Generate with the weights just published, update, settle, save while the trainer holds the device."""
        started, cpu_started = time.perf_counter(), time.process_time()
        times = {"publish": publication.duration_s}
        self.watch.take()  # what lies before belongs to no step
        stats = self._timed(times, "generate", self._generate)
        times["ledger"] = self.buffer.take_ledger_s()
        generated = of_rollout(stats, times["ledger"]) | {"ledger": times["ledger"]}
        groups = self._store()
        if stats.stopped:
            self.history.add_stopped(stats)
            self._log_timeline(stats)
            self._save_and_leave(under_way=True)
        update = self._timed(times, "update", lambda: self._surviving(lambda: self._train_on(groups)))
        with self.device.training():
            self.state.step += 1
            self.recovery.step_done()
            with self.watch.part("record"):
                metrics = self._settle(groups, stats, update, publication)
            times["ledger"] += self.buffer.take_ledger_s()
            times["step"] = publication.duration_s + time.perf_counter() - started
            metrics |= waterfall(times["step"], of_publication(publication), generated, self.watch.take())
            times["cpu"] = time.process_time() - cpu_started
            metrics |= {f"time/{name}": seconds for name, seconds in times.items()}
            self.metrics.log(self.step, metrics)
            self.progress.step_done(self.step, metrics)
            self._warn(metrics)
            if self.state.is_due():
                self._surviving(self._save)
        self._leave_if_stopped()

    # ---- the moves ------------------------------------------------------------------------------------------

    def _generate(self) -> RolloutStats:
        """One rollout. Replicas that are lost in it are done without; where all are, it goes on with fresh ones."""
        while True:
            self._surviving(self._publish_if_needed)
            with self.device.generating():
                stats = self._collect()
            if not stats.stopped or self.stop.requested is not None:
                return stats
            self.history.add_stopped(stats)
            self._log_timeline(stats)

    def _fit_to_kv(self) -> None:
        """As many samples in flight as the KV cache holds, where the configuration leaves that open."""
        capacity = self.worker.engine.kv_capacity
        if capacity is None or self.cfg.rollout.max_in_flight is not None:
            return
        first = self.buffer.num_drawn - LENGTHS_OF_STEPS * self.cfg.rollout.groups_per_step
        finished, unfinished = self.buffer.lengths(first)
        finished += self.history.record.lengths_since(first)
        lengths = LengthEstimate(finished, unfinished, cap=self.cfg.rollout.max_response_tokens)
        room = samples_that_fit(
            capacity, lengths, prompt_tokens=self.session.prompt_tokens, max_model_len=self.session.max_model_len
        )
        slots = min(room.samples, self.cfg.max_in_flight)
        if slots != self.collect_settings.max_in_flight:
            self.collect_settings = replace(self.collect_settings, max_in_flight=slots)
            if self.buffer.controller is not None:
                self.buffer.controller.slots = slots
            self.progress.message(f"step {self.step + 1}: {slots} samples in flight: {room.reason}")

    def _collect(self) -> RolloutStats:
        self._phase("generate")
        self._fit_to_kv()
        wanted = self.cfg.rollout.groups_per_step

        def on_progress(admitted: int, running: int, open_groups: int) -> None:
            self.watchdog.beat()
            self.progress.rollout(admitted, wanted, running, open_groups)
            self.status.progress(
                admitted, wanted, running=running, open_groups=open_groups, left_s=self.progress.left_s()
            )

        stats = collect(
            self.worker.engine,
            self.buffer,
            self.prompts,
            self.session.scorer,
            self.collect_settings,
            step=self.step,
            on_progress=on_progress,
            should_stop=lambda: self.stop.requested is not None or not self.worker.engine.max_slots,
        )
        if self.buffer.max_open != self._told_open_limit and self.buffer.open_limit_reason:
            self._told_open_limit = self.buffer.max_open
            reason = self.buffer.open_limit_reason
            self.progress.message(f"step {self.step + 1}: up to {self.buffer.max_open} groups open: {reason}")
        return stats

    def _store(self) -> list[Group]:
        """The rollout, which is on disk before anything is made of it."""
        self.timeline.phase("ledger", self.step + 1)
        with self.watch.part("ledger"):
            groups = self.buffer.rollout()
            self.buffer.store()
        return groups

    def _train_on(self, groups: Sequence[Group]) -> Update:
        """The update, whose outcome is then kept outside the workers."""
        with self.watch.part("hand_over"), self.device.training(), self.watch.part("build_batch"):
            update = self._update(groups)
        self.recovery.is_published = False
        with self.watch.part("keep_state"):
            self.worker.keep(self.step + 1)
        return update

    def _update(self, groups: Sequence[Group]) -> Update:
        """One pass over the rollout per epoch, one optimizer step per part."""
        from rlpost.algos.batch import build_batches, response_logprobs, reward_kl, with_advantages

        self._phase("update")
        trainer, algorithm, train = self.worker.trainer, self.algorithm, self.cfg.train
        zeros = [np.zeros(len(g.scored)) for g in groups]
        advantages = zeros if algorithm.kl_in_reward else algorithm.advantages(groups)
        batches = build_batches(
            groups,
            advantages,
            policy_version=self.step,
            max_row_tokens=train.row_tokens(self.session.runtime.device),
            num_parts=train.optimizer_steps_per_rollout,
        )
        old_logprobs = None
        if algorithm.needs_old_logprobs or self.cfg.logging.trainer_logprobs:
            scored = [self._with_logprobs(b, "old_logprobs") for b in batches]
            old_logprobs = response_logprobs(scored, groups)
            if algorithm.needs_old_logprobs:  # else they are for the record, and what is trained stays as it was
                batches = scored
        if algorithm.needs_reference:
            batches = [self._with_logprobs(b, "ref_logprobs") for b in batches]
        if algorithm.kl_in_reward:
            advantages = algorithm.advantages(groups, reward_kl(batches, groups))
            batches = with_advantages(batches, groups, advantages)
        results = []
        for _ in range(train.epochs):
            for batch in batches:
                self.watchdog.beat()
                with self.watch.part("train"):
                    results.append(trainer.update(batch, algorithm.objective))
        failed = find_untrained(groups, train.optimizer_steps_per_rollout, results)
        return Update(advantages=advantages, old_logprobs=old_logprobs, batches=batches, results=results, failed=failed)

    def _with_logprobs(self, batch: TrainBatch, field: str) -> TrainBatch:
        """The batch scored by the policy as it is now (``old_logprobs``) or by the frozen reference."""
        self.watchdog.beat()
        with self.watch.part(field):
            logprobs = self.worker.trainer.logprobs(batch.rows, reference=field == "ref_logprobs")
        rows = [replace(row, **{field: values}) for row, values in zip(batch.rows, logprobs, strict=True)]
        return replace(batch, rows=tuple(rows))

    def _publish(self) -> Publication:
        self._phase("publish")
        publication = self.device.publish_weights(policy_version=self.step)
        self.recovery.is_published = True
        return publication

    def _publish_if_needed(self) -> None:
        if not self.recovery.is_published:
            self._publish()

    def _settle(
        self, groups: Sequence[Group], stats: RolloutStats, update: Update, publication: Publication
    ) -> dict[str, float]:
        """The step's account: ledger, record, metrics, rollout table; guards that stop the run."""
        drawn_steps = [g.drawn_step for g in self.buffer.admitted]
        lengths = {g.order: [s.num_tokens for s in g.samples] for g in self.buffer.admitted}
        with self.watch.part("ledger"):
            self.buffer.settle(update.failed)
        self.buffer.check_conservation()
        for reason, count in Counter(update.failed.values()).items():
            self.progress.message(
                f"step {self.step}: {count} of {len(groups)} groups {SKIPPED[reason]}; nothing was applied"
            )
        if stats.num_failed_rewards:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(stats.failures.items()))
            self.progress.message(
                f"step {self.step}: {stats.num_failed_rewards} of {stats.num_judged} rewards failed ({kinds}); "
                f"the last one: {stats.last_failure}"
            )
        metrics = (
            reward_metrics(groups, stats)
            | scoring_metrics(self.session.scorer.take_counts(), self.session.scorer.num_pending)
            | rollout_metrics(groups, stats, self.buffer, drawn_steps, empty_ids=1)
            | update_metrics(update.results, update.batches, publication)
        )
        metrics |= self.history.add_step(stats, lengths, metrics)
        self.timeline.phase("log", self.step)
        self.metrics.log_rollouts(self.step, groups, update.advantages, update.old_logprobs)
        self.metrics.log_histograms(
            self.step, step_histograms(groups, update.advantages, policy_version=publication.policy_version)
        )
        trained = [group.uid for group in groups if group.uid not in update.failed]
        failed = [(uid, f"failed[{reason}]") for uid, reason in update.failed.items()]
        self._log_timeline(stats, admitted=trained, failed=failed)
        warning = check_mismatch(update.mismatch, stop=self.cfg.mismatch_stop, step=self.step)
        if warning:
            self.progress.message(warning)
        return metrics

    def _evaluate(self) -> None:
        cfg, session = self.cfg, self.session
        self._publish_if_needed()
        self._phase("eval")
        if cfg.rollout.keep_kv:
            self.worker.engine.abort_all()  # paused samples hold the KV cache; they are replayed in the next step
        started = time.perf_counter()

        def on_progress(finished: int, wanted: int) -> None:
            self.watchdog.beat()
            self.progress.evaluating(finished, wanted)
            self.status.progress(finished, wanted, left_s=self.progress.left_s())
            self.stop.raise_if_requested()

        try:
            result = evaluate_session(session, self.worker.engine, policy_version=self.step, on_progress=on_progress)
        except Stopped as stopped:
            if not stopped.at_once:
                self.worker.engine.abort_all()  # it is made again after the resume
                self._leave_if_stopped()
            raise
        self.history.add_evaluation(self.step, result)
        self.progress.evaluation(result.accuracy.mean, result.accuracy.low, result.accuracy.high)
        counts = session.eval_scorer.take_counts()
        self.timeline.log(self.step, iterations={"phase": "eval"} | iteration_sums(result.work))
        self.metrics.log_evaluation(self.step, result.samples)
        cached = {"eval/cache_hit_share": counts.cache_hits / counts.cache_lookups} if counts.cache_lookups else {}
        self.metrics.log(self.step, result.metrics() | cached | {"time/eval": time.perf_counter() - started})

    # ---- durable state --------------------------------------------------------------------------------------

    def _save(self, *, under_way: bool = False) -> Path:
        self._phase("save")
        started = time.perf_counter()
        path = self.state.save(self.worker.trainer, self.session.tokenizer, under_way=under_way)
        self.timeline.log(self.step)
        self.metrics.log(self.step, {"time/save": time.perf_counter() - started})
        return path

    def _resume(self, found: Found | None) -> None:
        """The trainer goes on from the checkpoint too; the log forgets what came after it."""
        if found is not None:
            self._on_trainer(lambda: self.state.load_trainer(found, self.worker.trainer))
            self.progress.message(f"resumed after step {self.step} from {found.path}")
        else:
            self.state.load_trainer(None, self.worker.trainer)
        if self._reached > self.step:
            self.progress.message(f"steps that were finished and are made again: {self._reached - self.step}")
        since = self.step if found is not None else None
        time_s = self.metrics.rewind(since, evaluated_step=self.history.evaluated_step)
        self.timeline.rewind(time_s)
        self._surviving(lambda: self.worker.keep(self.step))
        self.adviser.recall(read_steps(self.path), self.warnings.rewind(since))
        self._warn()

    def _leave_if_stopped(self) -> None:
        """Between two steps: a stop request ends the run here."""
        if self.stop.requested is not None:
            self._save_and_leave(under_way=False)

    def _save_and_leave(self, *, under_way: bool) -> None:
        if self.cfg.checkpoint.every < 0:
            self.progress.message("nothing is saved: checkpoint.every=-1")
        elif under_way or not self.state.is_saved:
            path = self._on_trainer(lambda: self._save(under_way=under_way))
            self.stop.note_saved()
            self.progress.message(f"saved {path}; the same command goes on from there")
        self.stop.raise_if_requested()

    # ---- the end --------------------------------------------------------------------------------------------

    def _close_run(self) -> dict[str, Any]:
        self._phase("save")
        model = self.path / "model"
        self._on_trainer(lambda: self.worker.trainer.export(model))
        self.session.tokenizer.save_pretrained(str(model))
        card = model_card(
            asdict(self.cfg), step=self.step, evaluations=self.history.evaluations, totals=self.history.totals
        )
        (model / "README.md").write_text(card, encoding="utf-8")
        comparison = compare_run(
            self.history.record, self.cfg, self.collect_settings, self.buffer, round(self.session.prompt_tokens)
        )
        if comparison is not None:
            replay = {
                "error": comparison.error,
                "synchronous_s": comparison.synchronous_s,
                "measured_s": comparison.measured_s,
            }
            self.metrics.log(self.step, {f"replay/{name}": value for name, value in replay.items()})
        facts = gather_facts(self.history, path=self.path, step=self.step, cfg=self.cfg, comparison=comparison)
        summary = make_summary(facts, self.history, self.buffer)
        self.timeline.log(self.step)
        run_dir.finish(self.path, summary)
        self.progress.close()
        print(closing_table(facts), flush=True)
        return summary

    # ---- small things ---------------------------------------------------------------------------------------

    def _eval_is_due(self, step: int) -> bool:
        every = self.cfg.eval.every
        wanted = step in (0, self.cfg.steps) or (every > 0 and step % every == 0)
        return every >= 0 and wanted and step > self.history.evaluated_step

    def _evals_left(self) -> int:
        return sum(self._eval_is_due(step) for step in range(self.step, self.cfg.steps + 1))

    def _beat(self) -> None:
        """Called while workers are waited for."""
        self.watchdog.beat()
        self.status.tick()

    def _phase(self, name: str) -> None:
        self.watchdog.beat(name)
        self.progress.phase(name)
        self.status.phase(name, self.step)
        done = self.step == self.cfg.steps or name in ("eval", "save")  # else it is part of the next step
        self.timeline.phase(name, self.step if done else self.step + 1)

    def _log_timeline(
        self, stats: RolloutStats, *, admitted: Sequence[str] = (), failed: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.timeline.log(
            stats.step + 1,
            spans={name: getattr(stats.spans, name) for name in timeline.COLUMNS},
            offset_s=self.metrics.now_s() - self.worker.engine.now(),
            admitted=admitted,
            dropped=[*stats.dropped, *failed],
            iterations={"phase": "generate"} | iteration_sums(stats.work),
        )

    def _warn(self, metrics: Mapping[str, float] | None = None) -> None:
        """Once for each thing that is typically wrong: in the display, in ``warnings.jsonl``, to the trackers."""
        for warning in self.adviser.look(metrics):
            self.progress.message(f"warning: {warning.text}")
            self.warnings.append(self.step, warning)
            if warning.wakes:
                self.metrics.alert(warning.name, warning.text)

    def _timed(self, times: dict[str, float], name: str, call: Any) -> Any:
        started = time.perf_counter()
        result = call()
        times[name] = time.perf_counter() - started
        return result

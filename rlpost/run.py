"""One run: its parts, how they are opened, resumed, saved and closed, and the operations that involve several of them.

:func:`open_run` puts a run together and always takes it down again; ``loop`` owns the order of its steps. :class:`Run`
holds the parts and the counters of the current step. Nothing here decides what is generated or trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from rlpost.config import Config
from rlpost.config.compose import to_yaml
from rlpost.durable import run_dir
from rlpost.durable.history import History
from rlpost.durable.run_state import CONFIG_FILE, Found, RunState, read_start
from rlpost.durable.stopping import Stopped, StopRequest
from rlpost.engine.protocol import Engine
from rlpost.errors import ShardsLost
from rlpost.evaluate import evaluate_session
from rlpost.evaluation.evaluate import EvalResult
from rlpost.prompts.cursor import draw_prompts, open_cursor
from rlpost.reporting.advice import facts_of
from rlpost.reporting.closing import closing_table, gather_facts, make_summary
from rlpost.reporting.model_card import model_card
from rlpost.reporting.progress import Progress
from rlpost.reporting.reporter import Reporter
from rlpost.rewards.selection import list_weights
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.collect import CollectSettings
from rlpost.rollout.concurrency import samples_that_fit
from rlpost.rollout.lengths import LengthEstimate
from rlpost.rollout.stats import RolloutStats
from rlpost.session import Session, open_session
from rlpost.simulation.replay import compare_run
from rlpost.train.protocol import PolicyTrainer
from rlpost.train.update_policy import Update, UpdateSettings, check_mismatch
from rlpost.types import Group
from rlpost.workers.local import start_worker
from rlpost.workers.protocol import Workers, WorkerSettings
from rlpost.workers.recovery import RecoveringWorkers

LENGTH_WINDOW_STEPS = 16  # steps used to estimate response length: it drifts with the policy over tens of steps
DETERMINISTIC_SCORE_EVERY = 8  # engine steps: waiting for rewards at every step would let slow rewards stop generation


class Restarts:
    """The attempts at one run in this process: its folder, and how far earlier attempts got."""

    def __init__(self, cfg: Config) -> None:
        self._limit = cfg.cluster.max_recoveries
        self.folder: run_dir.RunDir | None = None
        self.step = 0  # steps finished by the current attempt
        self.reached = 0  # the most steps finished by any earlier attempt
        self._fruitless = 0

    def note(self, lost: ShardsLost) -> None:
        """An attempt ended because its workers' state was lost; raises ``lost`` after too many without progress."""
        self._fruitless = 0 if self.step > self.reached else self._fruitless + 1
        if self.folder is None or self._fruitless > self._limit:
            raise lost
        self.reached = max(self.reached, self.step)
        print(f"{lost}; the run restarts from its latest checkpoint", flush=True)
        self.folder = run_dir.restart(self.folder)


@contextmanager
def open_run(cfg: Config, restarts: Restarts) -> Iterator[Run]:
    """A run with everything started and resumed. It is closed, and its end recorded, however the block is left.

    Raises ConfigError, DataError, ModelError before a device is touched, RunError if the folder or the checkpoint
    cannot be used.
    """
    path, start_from = find_folder(restarts.folder, cfg)
    session = open_session(cfg, started=read_start(path, start_from), run_folder=path)
    try:
        with hold_folder(cfg, restarts) as (folder, progress, stop):
            run = Run(session, folder, progress, stop)
            with started(run, restarts):
                yield run
    finally:
        session.close()


@contextmanager
def hold_folder(cfg: Config, restarts: Restarts) -> Iterator[tuple[run_dir.RunDir, Progress, StopRequest]]:
    """The run's folder, which this process holds, its display, and the requests to stop."""
    if restarts.folder is None:
        restarts.folder = run_dir.open_run_dir(cfg.runs_dir, str(cfg.name), resume=cfg.resume)
    with Progress(cfg.logging.progress) as progress:
        with StopRequest(cfg.checkpoint.stop_deadline_s, progress.stopping) as stop:
            yield restarts.folder, progress, stop


class Startable(Protocol):
    """A run as :func:`started` needs it."""

    report: Reporter

    @property
    def step(self) -> int: ...

    def start(self, restarts: Restarts) -> None: ...

    def close(self) -> None: ...


@contextmanager
def started(run: Startable, restarts: Restarts) -> Iterator[None]:
    """Starts the run; however the block is left, its end is recorded and it is closed."""
    try:
        run.start(restarts)
        yield
    except Stopped as stopped:
        run.report.end("stopped", str(stopped))
        raise
    except ShardsLost:
        raise  # the run is not over: another attempt follows
    except Exception as error:
        run.report.end("failed", str(error))
        raise
    finally:
        restarts.step = run.step
        run.close()


def find_folder(folder: run_dir.RunDir | None, cfg: Config) -> tuple[Path, Path | None]:
    """(folder, checkpoint that it starts from unless it has its own) of the run to be opened. Creates nothing."""
    if folder is not None:
        return folder.path, folder.start_from
    return run_dir.peek(cfg.runs_dir, str(cfg.name), resume=cfg.resume)


class Run:
    """One run's parts and counters; see :func:`open_run`. ``step`` counts finished steps: the policy version."""

    workers: RecoveringWorkers

    def __init__(self, session: Session, folder: run_dir.RunDir, progress: Progress, stop: StopRequest) -> None:
        """Everything that needs no device; :meth:`start` does the rest."""
        cfg = session.cfg
        self.cfg, self.session, self.path, self.stop = cfg, session, folder.path, stop
        self._start_from = folder.start_from
        self.report = Reporter(
            cfg,
            folder.path,
            progress=progress,
            facts=facts_of(cfg, session.train_sets, session.eval_prompts),
            decode=session.tokenizer.decode,
        )
        self._print_header(folder.note)
        session.open_result_cache(folder.path, self.report.message)
        cursor = open_cursor(session.train_sets, seed=cfg.seed, shuffle=cfg.data.shuffle)
        self.prompts = draw_prompts(cursor, session.train_sets)
        self.history = History()
        self.state = RunState(cfg, folder.path, cursor, self.history, started=session.started, say=self.report.message)
        self._is_finished = False

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def buffer(self) -> RolloutBuffer:
        return self.state.buffer

    # ---- start and end --------------------------------------------------------------------------------------

    def start(self, restarts: Restarts) -> None:
        """Read the checkpoint, start the workers, and bring every part to the checkpoint's state."""
        from rlpost.algos.algorithm import build_algorithm

        cfg, session = self.cfg, self.session
        found = self.state.recall(self._start_from)
        self.report.step = self.step
        (self.path / CONFIG_FILE).write_text(to_yaml(cfg))
        self.report.phase("start")
        self.algorithm = build_algorithm(cfg, list_weights(cfg.reward))
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
        self.update_settings = UpdateSettings(
            max_row_tokens=session.row_tokens,
            optimizer_steps=cfg.train.optimizer_steps_per_rollout,
            epochs=cfg.train.epochs,
            record_logprobs=cfg.logging.trainer_logprobs,
        )
        settings = session.worker_settings(needs_reference=self.algorithm.needs_reference)
        self.workers = RecoveringWorkers(
            start_workers(settings, self.path, say=self.report.message, waiting=self.report.waiting),
            limit=cfg.cluster.max_recoveries,
            begin=self.report.phase,
            say=self.report.message,
            timed=self.report.part,
        )
        self.report.follow(workers=self.workers.describe, engine_clock=lambda: self.workers.engine.now())
        self._resume(found, restarts)
        if not cfg.deterministic:
            self.stop.wait_for_boundaries()
        self.report.start(sum(self.evaluation_is_due(step) for step in range(self.step, cfg.steps + 1)))

    def finish(self) -> dict[str, Any]:
        """After the last step: export the model, write the closing table and ``finished.json``; returns the summary."""
        self.stop.wait_for_boundaries()  # what is left is always written, so that a finished run stays finished
        self.report.phase("save")
        model = self.path / "model"
        self.workers.with_trainer(lambda trainer: trainer.export(model))
        self.session.tokenizer.save_pretrained(str(model))
        history = self.history
        card = model_card(asdict(self.cfg), step=self.step, evaluations=history.evaluations, totals=history.totals)
        (model / "README.md").write_text(card, encoding="utf-8")
        comparison = compare_run(
            history.record, self.cfg, self.collect_settings, self.buffer, round(self.session.prompt_tokens)
        )
        if comparison is not None:
            replay = {name: getattr(comparison, name) for name in ("error", "synchronous_s", "measured_s")}
            self.report.log({f"replay/{name}": value for name, value in replay.items()})
        facts = gather_facts(history, path=self.path, step=self.step, cfg=self.cfg, comparison=comparison)
        summary = make_summary(facts, history, self.buffer)
        run_dir.finish(self.path, summary)
        self.report.print_closing(closing_table(facts))
        self._is_finished = True
        self.report.end("finished")
        return summary

    def close(self) -> None:
        self.stop.wait_for_boundaries()
        self.report.close(failed=not self._is_finished)
        self.state.close()
        if hasattr(self, "workers"):
            self.workers.close()

    # ---- moves of a step ------------------------------------------------------------------------------------

    def fit_to_kv_cache(self, engine: Engine) -> CollectSettings:
        """As many samples in flight as fit in the KV cache, unless the configuration sets a number."""
        if engine.kv_capacity is None or self.cfg.rollout.max_in_flight is not None:
            return self.collect_settings
        first = self.buffer.accounts.num_drawn - LENGTH_WINDOW_STEPS * self.cfg.rollout.groups_per_step
        finished, unfinished = self.buffer.lengths(first)
        finished += self.history.record.lengths_since(first)
        fit = samples_that_fit(
            engine.kv_capacity,
            LengthEstimate(finished, unfinished, cap=self.cfg.rollout.max_response_tokens),
            prompt_tokens=self.session.prompt_tokens,
            max_model_len=self.session.max_model_len,
        )
        slots = min(fit.samples, self.cfg.max_in_flight)
        if slots != self.collect_settings.max_in_flight:
            self.collect_settings = replace(self.collect_settings, max_in_flight=slots)
            if self.buffer.schedule.controller is not None:
                self.buffer.schedule.controller.slots = slots
            self.report.message(f"step {self.step + 1}: {slots} samples in flight: {fit.reason}")
        return self.collect_settings

    def note_partial(self, rollout: RolloutStats) -> None:
        """A rollout that ended early: its tokens stay in the buffer and its time is counted."""
        self.history.add_stopped(rollout)
        self.report.partial_rollout(rollout)

    def store(self, rollout: RolloutStats) -> list[Group]:
        """Persist the rollout before training on it. If a stop request ended it, save and raise ``Stopped``."""
        self.report.rollout(rollout, ledger_s=self.buffer.take_ledger_s())
        with self.report.part("ledger"):
            groups = self.buffer.rollout()
            self.buffer.store()
        if rollout.stopped:
            self.note_partial(rollout)
            self._save_and_stop(under_way=True)
        self.report.stored()
        return groups

    def settle(self, groups: list[Group], rollout: RolloutStats, update: Update) -> None:
        """Finish the step: its groups leave the buffer, every token is accounted for, its metrics are logged.

        Raises LedgerError if anything is unaccounted for, RunError if engine and trainer disagree too much.
        """
        self.report.updated()
        self.state.step += 1
        self.workers.step_done()
        with self.report.part("record"):
            drawn_steps = [g.drawn_step for g in self.buffer.admitted]
            lengths = {g.order: [s.num_tokens for s in g.samples] for g in self.buffer.admitted}
            with self.report.part("ledger"):
                self.buffer.settle(update.failed)
            self.buffer.check_conservation()
            scorer, buffer = self.session.scorer, self.buffer
            metrics = self.report.step_metrics(
                groups, rollout, update, buffer=buffer, drawn_steps=drawn_steps, scorer=scorer
            )
            metrics |= self.history.add_step(rollout, lengths, metrics)
        self.report.step_done(metrics, ledger_s=self.buffer.take_ledger_s())
        warning = check_mismatch(update.mismatch, stop=self.cfg.mismatch_stop, step=self.step)
        if warning:
            self.report.message(warning)

    # ---- evaluation -----------------------------------------------------------------------------------------

    def evaluation_is_due(self, step: int | None = None) -> bool:
        """At ``step`` (None: now): before the first step, after the last, and every ``eval.every`` steps between."""
        step = self.step if step is None else step
        every = self.cfg.eval.every
        wanted = step in (0, self.cfg.steps) or (every > 0 and step % every == 0)
        return every >= 0 and wanted and step > self.history.evaluated_step

    def evaluate(self) -> None:
        """Evaluate the published policy; on a stop request, save and raise ``Stopped``."""
        started = time.perf_counter()
        result = self.workers.with_engine(self._evaluate)
        if result is None:
            self.stop_if_requested()  # the resumed run repeats it
            raise AssertionError("an evaluation stops on request only")
        self.history.add_evaluation(self.step, result)
        counts = self.session.eval_scorer.take_counts()
        self.report.evaluation(result, counts, seconds=time.perf_counter() - started)

    def _evaluate(self, engine: Engine) -> EvalResult | None:
        self.report.phase("eval")
        if self.cfg.rollout.keep_kv:
            engine.abort_all()  # paused samples hold the KV cache; they are replayed in the next step
        return evaluate_session(
            self.session,
            engine,
            policy_version=self.step,
            on_progress=self.report.evaluation_progress,
            should_stop=lambda: self.must_stop(engine),
        )

    # ---- durable state --------------------------------------------------------------------------------------

    def save_is_due(self) -> bool:
        return self.state.is_due()

    def save(self, *, under_way: bool = False) -> Path:
        """Write a checkpoint now. ``under_way``: a stop request interrupted the step's rollout."""

        def save(trainer: PolicyTrainer) -> Path:
            self.report.phase("save")
            started = time.perf_counter()
            path = self.state.save(trainer, self.session.tokenizer, under_way=under_way)
            self.report.saved(seconds=time.perf_counter() - started)
            return path

        return self.workers.with_trainer(save)

    def must_stop(self, engine: Engine) -> bool:
        """Whether generation must end here: on a stop request, or because every replica is lost."""
        return self.stop.requested is not None or not engine.max_slots

    def stop_if_requested(self) -> None:
        """Between two steps: if a stop was requested, save and raise ``Stopped``."""
        if self.stop.requested is not None:
            self._save_and_stop(under_way=False)

    def _save_and_stop(self, *, under_way: bool) -> None:
        if self.cfg.checkpoint.every < 0:
            self.report.message("nothing is saved: checkpoint.every=-1")
        elif under_way or not self.state.is_saved:
            path = self.save(under_way=under_way)
            self.stop.note_saved()
            self.report.message(f"saved {path}; the same command resumes from there")
        self.stop.raise_if_requested()

    def _resume(self, found: Found | None, restarts: Restarts) -> None:
        """Resume the trainer from the checkpoint as well; the logs drop what came after it."""
        self.workers.resume(self.step, lambda trainer: self.state.load_trainer(found, trainer))
        if found is not None:
            self.report.message(f"resumed after step {self.step} from {found.path}")
        if restarts.reached > self.step:
            self.report.message(f"repeating {restarts.reached - self.step} completed steps")
        step = self.step if found is not None else None
        self.report.resume(step, evaluated_step=self.history.evaluated_step)

    def _print_header(self, note: str) -> None:
        cfg, num_dropped = self.cfg, sum(one.num_dropped for one in self.session.train_sets)
        if note:
            self.report.message(note)
        threads = f"{cfg.threads} CPU thread{'s' if cfg.threads != 1 else ''}"
        self.report.message(f"device {cfg.device}, {cfg.model.dtype}, {threads}, run in {self.path}")
        if num_dropped:
            self.report.message(f"{num_dropped} training prompts are too long and were left out")


def start_workers(
    settings: WorkerSettings, run_folder: Path, *, say: Callable[[str], None], waiting: Callable[[], None]
) -> Workers:
    """The worker in this process, or the cluster's. ``waiting`` is called while waiting for workers."""
    if settings.cfg.cluster.kind == "ray":
        from rlpost.workers.cluster.workers import start_cluster

        return start_cluster(settings, run_folder, say=say, beat=waiting)
    return start_worker(settings)

"""One supervised run: its parts, how they are opened, resumed, saved and closed, and the moves of a step.

:func:`open_run` puts a run together and always takes it down again; ``sft.loop`` owns the order of its steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np

from rlpost.algos.batch import build_batch, supervised_sequence
from rlpost.config import Config
from rlpost.config.compose import to_yaml
from rlpost.config.locations import expand_home
from rlpost.durable import run_dir
from rlpost.durable.run_state import CONFIG_FILE, read_start
from rlpost.durable.stopping import StopRequest
from rlpost.engine.protocol import Engine
from rlpost.errors import RunError, explain
from rlpost.evaluate import evaluate_session
from rlpost.evaluation.evaluate import EvalResult
from rlpost.preflight.check_values import name_sft_run
from rlpost.prompts.supervised import Example
from rlpost.reporting.model_card import supervised_card
from rlpost.reporting.progress import Progress, duration, percent
from rlpost.reporting.reporter import Reporter
from rlpost.run import Restarts, find_folder, hold_folder, start_workers, started
from rlpost.sft.draws import Drawn, draw_step
from rlpost.sft.session import SftSession, open_session
from rlpost.sft.state import SftState
from rlpost.train.protocol import Objective, PolicyTrainer, UpdateResult
from rlpost.types import PackedRow, TrainBatch
from rlpost.workers.recovery import RecoveringWorkers

EVAL_ROWS = 64  # packed rows scored at once on a worker: between two such parts a run can report and stop


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a step is trained on."""

    drawn: Drawn
    batch: TrainBatch
    began_s: float
    began_cpu_s: float


@contextmanager
def open_run(cfg: Config, restarts: Restarts) -> Iterator[SftRun]:
    """A run with everything started and resumed. It is closed, and its end recorded, however the block is left.

    Raises ConfigError, DataError, ModelError before a device is touched, RunError if the folder or the checkpoint
    cannot be used.
    """
    cfg = replace(cfg, name=name_sft_run(cfg), algo=replace(cfg.algo, name="sft"))
    path, start_from = find_folder(restarts.folder, cfg)
    with open_session(cfg, started=read_start(path, start_from) or datetime.now(), run_folder=path) as session:
        with hold_folder(cfg, restarts) as (folder, progress, stop):
            run = SftRun(session, folder, progress, stop)
            with started(run, restarts):
                yield run


class SftRun:
    """One run's parts and counters; see :func:`open_run`."""

    workers: RecoveringWorkers

    def __init__(self, session: SftSession, folder: run_dir.RunDir, progress: Progress, stop: StopRequest) -> None:
        """Everything that needs no device; :meth:`start` does the rest."""
        cfg = session.cfg
        self.cfg, self.session, self.path, self.stop = cfg, session, folder.path, stop
        self._start_from = folder.start_from
        self.report = Reporter(cfg, folder.path, progress=progress, facts=None, decode=session.tokenizer.decode)
        self._print_header(folder.note)
        self.state = SftState(cfg, folder.path, session.draws, started=session.started, say=self.report.message)
        if session.generation is not None:
            session.generation.open_result_cache(folder.path, self.report.message)
        self._eval_rows = list(pack(session.eval_examples, session.row_tokens).rows)
        self._update_s = 0.0  # of the current step
        self._is_finished = False

    @property
    def step(self) -> int:
        return self.state.step

    # ---- start and end --------------------------------------------------------------------------------------

    def start(self, restarts: Restarts) -> None:
        """Read the checkpoint, start the workers, and bring every part to the checkpoint's state."""
        found = self.state.recall(self._start_from)
        self.report.step = self.step
        (self.path / CONFIG_FILE).write_text(to_yaml(self.cfg))
        self.report.phase("start")
        self.workers = RecoveringWorkers(
            start_workers(
                self.session.worker_settings(), self.path, say=self.report.message, waiting=self.report.waiting
            ),
            limit=self.cfg.cluster.max_recoveries,
            begin=self.report.phase,
            say=self.report.message,
            timed=self.report.part,
        )
        has_engine = self.session.generation is not None
        clock = (lambda: self.workers.engine.now()) if has_engine else time.perf_counter
        self.report.follow(workers=self.workers.describe, engine_clock=clock)
        self.workers.resume(self.step, lambda trainer: self.state.load_trainer(found, trainer))
        if found is not None:
            self.report.message(f"resumed after step {self.step} from {found.path}")
        if restarts.reached > self.step:
            self.report.message(f"repeating {restarts.reached - self.step} completed steps")
        step = self.step if found is not None else None
        evaluated = max(self.state.history.evaluated_step(kind) for kind in ("loss", "accuracy"))
        self.report.resume(step, evaluated_step=evaluated)
        self.stop.wait_for_boundaries()
        self.report.start(sum(self.evaluation_is_due(step) for step in range(self.step, self.cfg.steps + 1)))

    def finish(self) -> Path:
        """After the last step: export the model, write ``finished.json``; returns the model's folder."""
        self.report.phase("save")
        history = self.state.history
        output = Path(expand_home(self.cfg.sft.output)) if self.cfg.sft.output else self.path / "model"
        self.workers.with_trainer(lambda trainer: trainer.export(output))
        self.session.tokenizer.save_pretrained(str(output))
        card = supervised_card(asdict(self.cfg), step=self.step, evaluations=history.evaluations, totals=history.totals)
        (output / "README.md").write_text(card, encoding="utf-8")
        elapsed_s = self.state.count_time()
        summary = {"steps": self.step, "duration_s": elapsed_s, **asdict(history), "model": str(output)}
        run_dir.finish(self.path, summary)
        lines = [f"Done: {self.step} steps in {duration(elapsed_s)}"]
        if losses := [evaluation["eval/loss"] for evaluation in history.of_kind("loss")]:
            lines.append(f"loss on data.eval: {losses[0]:.4f} before, {losses[-1]:.4f} after, nats per token")
        if accuracies := [evaluation["eval/accuracy"] for evaluation in history.of_kind("accuracy")]:
            lines.append(f"accuracy on data.eval: {percent(accuracies[0])} before, {percent(accuracies[-1])} after")
        lines.append(f"sft: model written to {output}; use it with model.path={output}")
        self._is_finished = True
        self.report.print_closing("\n".join(lines))
        self.report.end("finished")
        return output

    def close(self) -> None:
        self.stop.wait_for_boundaries()
        self.report.close(failed=not self._is_finished)
        self.state.close()
        if hasattr(self, "workers"):
            self.workers.close()

    # ---- moves of a step ------------------------------------------------------------------------------------

    def draw(self) -> Step:
        """The next step's examples: whole ones, until they have ``sft.tokens_per_step`` tokens."""
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        drawn = draw_step(self.session.draws, self.cfg.sft.tokens_per_step)
        assert drawn.uids, "the steps were counted from these draws"
        batch = pack(drawn.examples, self.session.row_tokens)
        return Step(drawn=drawn, batch=batch, began_s=began_s, began_cpu_s=began_cpu_s)

    def update(self, step: Step, objective: Objective) -> UpdateResult:
        began_s = time.perf_counter()
        result = self.workers.update(partial(_update, batch=step.batch, objective=objective))
        self._update_s = time.perf_counter() - began_s
        return result

    def settle(self, step: Step, result: UpdateResult) -> None:
        """Finish the step: its draws are recorded, its metrics logged. Raises RunError if nothing was applied."""
        if not result.applied:
            do = "lower sft.lr; the same command resumes from the last checkpoint"
            raise RunError(explain(f"sft step {self.step + 1}: loss", result.loss, "a finite loss and gradient", do))
        self.state.record(step.drawn)
        self.workers.step_done()
        totals, dropped = self.state.history.totals, self.session.draws.state_dict().get("num_dropped")
        totals["samples"] += step.batch.num_sequences
        totals["tokens"] += step.batch.num_tokens
        seconds = time.perf_counter() - step.began_s
        epoch = self.session.draws.epoch
        self.report.supervised_step(
            {
                **result.metrics,
                "loss/grad_norm": result.grad_norm,
                "loss/lr": result.lr,
                "loss/tokens": step.batch.num_tokens,
                "loss/sequences": step.batch.num_sequences,
                "sft/tokens": step.drawn.num_tokens,
                **({"sft/epoch": epoch} if epoch is not None else {}),
                **({"sft/dropped": dropped} if dropped is not None else {}),
                **{f"total/{name}": total for name, total in totals.items()},
                "time/update": self._update_s,
                "time/step": seconds,
                "time/cpu": time.process_time() - step.began_cpu_s,
            }
        )

    # ---- evaluation -----------------------------------------------------------------------------------------

    def evaluation_is_due(self, step: int | None = None) -> bool:
        """At ``step`` (None: now): before the first step, after the last, and as often as ``sft`` says between."""
        step = self.step if step is None else step
        return self._loss_is_due(step) or self._generation_is_due(step)

    def evaluate(self) -> None:
        """On ``data.eval``. What a stop request leaves out, a resumed run repeats."""
        began_s = time.perf_counter()
        if self._loss_is_due(self.step):
            self._evaluate_loss(began_s)
        if self._generation_is_due(self.step) and self.stop.requested is None:
            self._evaluate_generation(began_s)

    def _loss_is_due(self, step: int) -> bool:
        evaluated = self.state.history.evaluated_step("loss")
        return bool(self._eval_rows) and self._is_due(step, self.cfg.sft.eval_every or 0, evaluated)

    def _generation_is_due(self, step: int) -> bool:
        every, evaluated = self.cfg.sft.generate_every, self.state.history.evaluated_step("accuracy")
        return every >= 0 and self._is_due(step, every, evaluated)

    def _is_due(self, step: int, every: int, evaluated_step: int) -> bool:
        return step > evaluated_step and (step in (0, self.cfg.steps) or (every > 0 and step % every == 0))

    def _evaluate_loss(self, began_s: float) -> None:
        self.report.phase("eval")
        loss, num_tokens = 0.0, 0
        for start in range(0, len(self._eval_rows), EVAL_ROWS):
            if self.stop.requested is not None:
                return
            rows = self._eval_rows[start : start + EVAL_ROWS]
            logprobs = self.workers.with_trainer(partial(_score, rows=rows))
            for row, values in zip(rows, logprobs, strict=True):
                loss -= float(np.asarray(values, np.float64)[row.loss_mask].sum())
                num_tokens += int(row.loss_mask.sum())
            self.report.evaluation_progress(start + len(rows), len(self._eval_rows))
        metrics = {"eval/loss": loss / num_tokens, "eval/tokens": num_tokens}
        self.state.history.evaluations.append({"step": self.step, **metrics})
        self.report.loss_evaluation(metrics, seconds=time.perf_counter() - began_s)

    def _evaluate_generation(self, began_s: float) -> None:
        """As an RL run does: the weights are published to the engine, which generates; the reward scores.

        ``began_s``: with the loss on the same step, whose time is part of this evaluation's.
        """
        session = self.session.generation
        assert session is not None

        def generate(engine: Engine) -> EvalResult | None:
            self.report.phase("eval")
            return evaluate_session(
                session,
                engine,
                policy_version=self.step,
                on_progress=self.report.evaluation_progress,
                should_stop=lambda: self.stop.requested is not None or not engine.max_slots,
            )

        result = self.workers.with_engine(generate)
        if result is None:
            return
        self.state.history.evaluations.append({"step": self.step, **result.metrics()})
        seconds = time.perf_counter() - began_s
        self.report.evaluation(result, session.eval_scorer.take_counts(), seconds=seconds)

    # ---- durable state --------------------------------------------------------------------------------------

    def save_is_due(self) -> bool:
        return self.state.is_due()

    def save(self) -> Path:
        def save(trainer: PolicyTrainer) -> Path:
            self.report.phase("save")
            began_s = time.perf_counter()
            path = self.state.save(trainer, self.session.tokenizer)
            self.report.saved(seconds=time.perf_counter() - began_s)
            return path

        return self.workers.with_trainer(save)

    def stop_if_requested(self) -> None:
        """Between two steps: if a stop was requested, save and raise ``Stopped``."""
        if self.stop.requested is None:
            return
        if self.cfg.checkpoint.every < 0:
            self.report.message("nothing is saved: checkpoint.every=-1")
        elif not self.state.is_saved:
            path = self.save()
            self.stop.note_saved()
            self.report.message(f"saved {path}; the same command resumes from there")
        self.stop.raise_if_requested()

    # ---- private --------------------------------------------------------------------------------------------

    def _print_header(self, note: str) -> None:
        cfg, session = self.cfg, self.session
        if note:
            self.report.message(note)
        threads = f"{cfg.threads} CPU thread{'s' if cfg.threads != 1 else ''}"
        self.report.message(f"device {cfg.device}, {cfg.model.dtype}, {threads}, run in {self.path}")
        source = "lessons of sft.generator" if session.num_examples is None else f"{session.num_examples:,} examples"
        self.report.message(f"sft: {cfg.steps} steps of {cfg.sft.tokens_per_step} tokens from {source}")
        if session.num_dropped:
            self.report.message(f"{session.num_dropped} examples are too long and were left out")


def pack(examples: list[Example] | tuple[Example, ...], row_tokens: int) -> TrainBatch:
    sequences = [supervised_sequence(example.token_ids, example.loss_mask) for example in examples]
    return build_batch(sequences, policy_version=0, max_row_tokens=row_tokens)


def _update(trainer: PolicyTrainer, *, batch: TrainBatch, objective: Objective) -> UpdateResult:
    return trainer.update(batch, objective)


def _score(trainer: PolicyTrainer, *, rows: list[PackedRow]) -> list[np.ndarray]:
    return trainer.logprobs(rows)

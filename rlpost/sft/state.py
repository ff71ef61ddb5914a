"""Everything a supervised run must not lose, saved and restored as one unit.

Like ``durable.run_state``, whose functions it uses, with other contents: :meth:`SftState.recall` restores what needs
no device, :meth:`SftState.load_trainer` the rest. A checkpoint contains ``trainer/``, ``config.yaml``, ``model_files/``
and ``manifest.json`` as an RL run's does, and

    drawn.jsonl    the ledger: which draws each step was trained on
    state.json     step, the run's start, position in the data, totals, losses on data.eval, random states
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from rlpost.config import Config
from rlpost.config.compose import to_yaml
from rlpost.durable import checkpoint, random_state
from rlpost.durable.config_changes import HARMLESS
from rlpost.durable.run_state import (
    CONFIG_FILE,
    MODEL_FILES,
    STATE_FILE,
    TRAINER,
    Found,
    find_changes,
    find_to_resume,
    load_trainer,
    read_tracker_id,
    reading,
    restore_tracker_id,
    save_is_due,
    save_model_files,
    set_aside_later,
    write,
)
from rlpost.errors import RunError, explain
from rlpost.reporting.metrics import JsonLines, read_rows
from rlpost.sft.draws import Drawn, Draws
from rlpost.train.checkpoint_layout import check_layout, describe
from rlpost.train.protocol import PolicyTrainer

KIND = "sft"
DRAWN_FILE = "drawn.jsonl"

# What a supervised run does not read may change. ``sft.*`` is what it computes, but for these.
UNUSED = ("reward.*", "algo.*", "rollout.*", "engine.*", "eval.*", "user.*", "canary_threshold", "mismatch_stop")
OBSERVING = ("description", "sft.output", "sft.eval_every", "sft.generate_every")
MAY_CHANGE = (*(key for key in HARMLESS if key != "sft.*"), *UNUSED, *OBSERVING)


@dataclass
class SftHistory:
    """Totals and evaluations from first step to last; ``elapsed_s`` excludes the time between a stop and a resume."""

    totals: dict[str, float] = field(default_factory=lambda: {"samples": 0.0, "tokens": 0.0})
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # step, and eval/loss or eval/accuracy with others
    elapsed_s: float = 0.0

    def evaluated_step(self, kind: str) -> int:
        """The last step with an evaluation of this kind (loss, accuracy), -1 if there is none."""
        return max((int(e["step"]) for e in self.of_kind(kind)), default=-1)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [evaluation for evaluation in self.evaluations if f"eval/{kind}" in evaluation]


class SftState:
    """See the module docstring. ``step`` counts finished steps."""

    def __init__(
        self, cfg: Config, run_dir: Path, draws: Draws, *, started: datetime, say: Callable[[str], None]
    ) -> None:
        """``draws`` is new; :meth:`recall` brings it to the run's state."""
        self.cfg, self.path, self.draws, self.started = cfg, run_dir, draws, started
        self.step, self.history = 0, SftHistory()
        self._root = run_dir / checkpoint.FOLDER
        self._layout = describe(world=cfg.cluster.num_workers, zero_stage=cfg.train.zero_stage, dtype=cfg.model.dtype)
        self._say = say
        self._ledger = JsonLines(run_dir / DRAWN_FILE)
        self._saved: checkpoint.Name | None = None
        self._saved_s = self._counted_s = time.monotonic()

    @property
    def is_saved(self) -> bool:
        return self._saved is not None and self._saved.step == self.step

    def recall(self, start_from: Path | None) -> Found | None:
        """Restore all that needs no device, from ``start_from`` or the newest intact checkpoint; None: a new run.

        Raises RunError or DataError if the run cannot resume with these settings; until then nothing has changed.
        """
        found = find_to_resume(self._root, start_from, kind=KIND, say=self._say)
        live = self.path / DRAWN_FILE
        if found is None:
            live.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
            return None
        check_layout(found.path / TRAINER, self._layout)
        changes = find_changes(found, self.cfg, MAY_CHANGE)
        other = next((one for one in changes if one.key == "sft.tokens_per_step"), None)
        if other is not None and self.cfg.sft.epochs is not None:
            do = "restore it, or use another name: it decides how many steps the epochs are"
            raise RunError(explain(f"resuming: {other.key}", other.now, f"{other.before}, with sft.epochs", do))
        with reading(found):
            self.step = found.state["step"]
            self.draws.load_state_dict(found.state["draws"])
            self.history = SftHistory(**found.state["history"])
        self._check_ledger(found.path / DRAWN_FILE)
        if changes:
            self._say("changed since the checkpoint: " + "; ".join(map(str, changes)))
        set_aside_later(found, self._root, going_back=start_from is not None, say=self._say)
        if found.is_of(self._root):
            restore_tracker_id(self.path, found)
        undone = 0
        with contextlib.suppress(ValueError):  # a torn line; the checkpoint's own copy is whole
            undone = _count_drawn(live) - self.draws.num_drawn if live.exists() else 0
        if undone > 0 and found.is_of(self._root):
            self._say(f"undone, because it came after {found.path.name}: {undone:,} draws, which will be repeated")
        shutil.copy(found.path / DRAWN_FILE, live)
        self._saved, self._counted_s = found.name, time.monotonic()
        return found

    def load_trainer(self, found: Found | None, trainer: PolicyTrainer) -> None:
        """Restore the trainer, and the random states: the last action before the loop continues."""
        load_trainer(found, trainer, seed=self.cfg.seed)

    def record(self, drawn: Drawn) -> None:
        """The next step was trained on these draws."""
        self.step += 1
        self._ledger.append({"step": self.step, "uids": drawn.uids})

    def is_due(self) -> bool:
        return save_is_due(self.cfg, self.step, saved_s=self._saved_s)

    def save(self, trainer: PolicyTrainer, tokenizer: Any) -> Path:
        """Write a checkpoint now; then remove those no longer needed."""
        live = self.path / DRAWN_FILE
        live.touch()
        self._check_ledger(live)
        name = checkpoint.next_name(self._root, self.step, under_way=False)
        path = checkpoint.save(
            self._root,
            name,
            {
                TRAINER: trainer.save,
                DRAWN_FILE: lambda file: write(file, live.read_text()),
                STATE_FILE: lambda file: write(file, json.dumps(self._state())),
                CONFIG_FILE: lambda file: write(file, to_yaml(self.cfg)),
                MODEL_FILES: lambda folder: save_model_files(trainer, tokenizer, folder),
            },
        )
        self._saved, self._saved_s = name, time.monotonic()
        settings = self.cfg.checkpoint
        checkpoint.clean_up(self._root, keep_last=settings.keep_last, keep_every=settings.keep_every)
        return path

    def count_time(self) -> float:
        """Adds the time since the last call; returns the run's seconds so far."""
        now = time.monotonic()
        self.history.elapsed_s += now - self._counted_s
        self._counted_s = now
        return self.history.elapsed_s

    def close(self) -> None:
        self._ledger.close()

    def _check_ledger(self, ledger: Path) -> None:
        """As many draws are recorded as were made."""
        recorded = _count_drawn(ledger)
        if recorded != self.draws.num_drawn:
            do = "use another checkpoint, or another name"
            raise RunError(explain(str(ledger), f"{recorded} draws", f"{self.draws.num_drawn}, as were made", do))

    def _state(self) -> Mapping[str, Any]:
        self.count_time()
        return {
            "kind": KIND,
            "step": self.step,
            "started": self.started.isoformat(),
            "draws": self.draws.state_dict(),
            "history": asdict(self.history),
            "random": random_state.get_state(),
            "tracker_run_id": read_tracker_id(self.path),
        }


def _count_drawn(ledger: Path) -> int:
    return sum(len(row["uids"]) for row in read_rows(ledger))

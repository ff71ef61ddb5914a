"""Everything a run must not lose, saved and restored as one unit: step, ledger and buffer, position in the data,
history, random states, trainer, tracker's id, configuration.

:meth:`RunState.recall` finds the newest intact checkpoint and restores what needs no device; :meth:`load_trainer`
restores the rest once there is one; :meth:`save` writes the next checkpoint. ``run`` is its only caller; ``loop`` owns
the order of steps, this module owns what a step boundary consists of. The functions at the end serve ``sft`` as well.
A checkpoint contains

    trainer/       DeepSpeed's state, optimizer and schedule, torch's random states
    ledger.sqlite  the groups that are not trained yet, their tokens, reward results and versions
    state.json     step, the run's start, counters, prompt cursor, history, random states, tracker's id
    config.yaml    the resolved configuration
    model_files/   the model's configuration and tokenizer, for ``rlpost export``
    manifest.json  size and checksum of every file
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpost.config import Config
from rlpost.config.compose import to_yaml
from rlpost.durable import checkpoint, random_state
from rlpost.durable.config_changes import HARMLESS, Change, changed_keys, refuse_changes, was_left_open
from rlpost.durable.filesystem import POINTER, ledger_path
from rlpost.durable.run_dir import TRACKER_ID, note_going_back
from rlpost.errors import RunError, explain
from rlpost.prompts.cursor import Cursor
from rlpost.rollout.accounts import LedgerError
from rlpost.rollout.buffer import RolloutBuffer
from rlpost.rollout.ledger import FILE as LEDGER_FILE
from rlpost.rollout.ledger import Ledger
from rlpost.rollout.ledger_recovery import RecoveredLedger, recover_ledger, start_ledger
from rlpost.rollout.strategy import RolloutStrategy
from rlpost.train.checkpoint_layout import check_layout, describe
from rlpost.train.protocol import PolicyTrainer

if TYPE_CHECKING:
    from rlpost.durable.history import History

STATE_FILE, CONFIG_FILE, TRAINER, MODEL_FILES = "state.json", "config.yaml", "trainer", "model_files"
KIND = "train"  # of a run whose checkpoints do not say otherwise

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The checkpoint that a run resumes from."""

    name: checkpoint.Name
    path: Path
    state: Mapping[str, Any]

    def is_of(self, root: Path) -> bool:
        """Whether it is one of the checkpoints in ``root``, and not another run's that this one starts from."""
        return self.path.parent.resolve() == root.resolve()


class RunState:
    """See the module docstring. ``step`` counts finished steps and is also the next policy version to be published."""

    def __init__(
        self, cfg: Config, run_dir: Path, cursor: Cursor, history: History, *, started: datetime, say: Say
    ) -> None:
        """``cursor`` and ``history`` are new; :meth:`recall` brings them to the run's state. ``started``: when the
        run began (:func:`read_start`, or now)."""
        self.cfg, self.path, self.cursor, self.history, self.started = cfg, run_dir, cursor, history, started
        self.step = 0
        self.buffer: RolloutBuffer  # with its ledger, from ``recall`` on
        self._root = run_dir / checkpoint.FOLDER
        self._layout = describe(world=cfg.cluster.num_workers, zero_stage=cfg.train.zero_stage, dtype=cfg.model.dtype)
        self._say = say
        self._recovery: RecoveredLedger | None = None
        self._saved: checkpoint.Name | None = None
        self._saved_s = time.monotonic()

    # ---- restoring ------------------------------------------------------------------------------------------

    def recall(self, start_from: Path | None) -> Found | None:
        """Restore all that needs no device, from ``start_from`` or the newest intact checkpoint; None: a new run.

        Raises RunError or DataError, before a device is touched, if the run cannot resume with these settings.
        """
        found = find_to_resume(self._root, start_from, kind=KIND, say=self._say)
        if found is not None:
            self._check(found)
            # Nothing has changed on disk so far: a refused resume leaves the run as it was.
            set_aside_later(found, self._root, going_back=start_from is not None, say=self._say)
        live = self._place_ledger()
        if found is None:
            self._recovery = recovery = start_ledger(live)
            self.buffer = self._make_buffer(recovery.ledger)
            self.buffer.accounts.roll_back(recovery.ledger.rolled_back())
        else:
            self._recovery = recovery = recover_ledger(live, found.path / LEDGER_FILE, step=found.name.step)
            self.buffer = self._make_buffer(recovery.ledger)
            self._load(found, recovery)
            self._saved = found.name
        self._report(recovery, found)
        return found

    def load_trainer(self, found: Found | None, trainer: PolicyTrainer) -> None:
        """Restore the trainer, and the random states: the last action before the loop continues."""
        load_trainer(found, trainer, seed=self.cfg.seed)

    # ---- saving ---------------------------------------------------------------------------------------------

    @property
    def is_saved(self) -> bool:
        """Whether the newest checkpoint is current: as many steps finished, and none in progress since."""
        return self._saved is not None and self._saved.step == self.step

    def is_due(self) -> bool:
        """By steps (and after the last one), or by time since the last checkpoint."""
        return save_is_due(self.cfg, self.step, saved_s=self._saved_s)

    def save(self, trainer: PolicyTrainer, tokenizer: Any, *, under_way: bool = False) -> Path:
        """Write a checkpoint now; then remove what is no longer needed.

        ``under_way``: a stop request interrupted the step; its partial rollout is part of the checkpoint.
        """
        self.buffer.check_conservation(under_way=under_way)
        self.buffer.check_ledger()
        self._check_cursor()
        name = checkpoint.next_name(self._root, self.step, under_way=under_way)
        ledger = self.buffer.ledger
        assert ledger is not None
        path = checkpoint.save(
            self._root,
            name,
            {
                TRAINER: trainer.save,
                LEDGER_FILE: self._copy_ledger,
                STATE_FILE: lambda file: write(file, json.dumps(self._state(under_way))),
                CONFIG_FILE: lambda file: write(file, to_yaml(self.cfg)),
                MODEL_FILES: lambda folder: save_model_files(trainer, tokenizer, folder),
            },
        )
        self._saved, self._saved_s = name, time.monotonic()
        oldest = checkpoint.clean_up(
            self._root, keep_last=self.cfg.checkpoint.keep_last, keep_every=self.cfg.checkpoint.keep_every
        )
        ledger.compact(oldest)
        return path

    def _copy_ledger(self, file: Path) -> None:
        """SQLite writes beside the ledger, which is on a local disk even if the run directory is not."""
        ledger = self.buffer.ledger
        assert ledger is not None
        beside = ledger.path.with_name(f".{LEDGER_FILE}.copy")
        beside.unlink(missing_ok=True)
        ledger.snapshot(beside, step=self.step)
        shutil.move(beside, file)

    def close(self) -> None:
        """Close the ledger, so that its main file contains everything."""
        if self._recovery is not None:
            self._recovery.ledger.close()
            self._recovery = None

    # ---- private --------------------------------------------------------------------------------------------

    def _check(self, found: Found) -> None:
        """Whether this run may resume from the checkpoint; only reads."""
        check_layout(found.path / TRAINER, self._layout)
        changes = find_changes(found, self.cfg)
        copy = Ledger(found.path / LEDGER_FILE, read_only=True)
        try:
            with reading(found):
                buffer = self._make_buffer(copy)
                buffer.load_state_dict(found.state["buffer"], copy.read_open())
                self.step = found.state["step"]
                self.cursor.load_state_dict(found.state["cursor"])
                self.history.load_state_dict(found.state["history"])
        finally:
            copy.close()
        longest, limit = buffer.longest_unfinished(), self.cfg.rollout.max_response_tokens
        if longest >= limit:
            do = "an unfinished response is that long; restore the old value, or use another name"
            raise RunError(explain("resuming: rollout.max_response_tokens", limit, f"> {longest}", do))
        if changes:
            self._say("changed since the checkpoint: " + "; ".join(map(str, changes)))

    def _place_ledger(self) -> Path:
        live, note = ledger_path(self.path, self.cfg.ledger_dir)
        if note:
            self._say(note)
        pointer = self.path / POINTER
        if live.parent == self.path:
            pointer.unlink(missing_ok=True)
        else:
            pointer.write_text(f"{live}\n")
        return live

    def _make_buffer(self, ledger: Ledger) -> RolloutBuffer:
        strategy = RolloutStrategy.of(self.cfg.rollout)
        return RolloutBuffer(strategy, ledger=ledger, slots=self.cfg.max_in_flight)

    def _load(self, found: Found, recovery: RecoveredLedger) -> None:
        with reading(found):
            groups = recovery.ledger.read_open()
            self.buffer.load_state_dict(found.state["buffer"], groups, rolled_back=recovery.ledger.rolled_back())
        self.buffer.check_ledger()
        self._check_cursor()
        if found.is_of(self._root):
            restore_tracker_id(self.path, found)

    def _check_cursor(self) -> None:
        """Each draw of the cursor is a group in the buffer, and no group comes from elsewhere."""
        if self.cursor.num_drawn != self.buffer.accounts.num_drawn:
            raise LedgerError(
                f"{self.cursor.num_drawn} prompts were drawn, {self.buffer.accounts.num_drawn} groups are known"
            )

    def _state(self, under_way: bool) -> dict[str, Any]:
        return {
            "step": self.step,
            "started": self.started.isoformat(),
            "buffer": self.buffer.state_dict(under_way=under_way),
            "cursor": self.cursor.state_dict(),
            "history": self.history.state_dict(),
            "random": random_state.get_state(),
            "tracker_run_id": read_tracker_id(self.path),
        }

    def _report(self, recovery: RecoveredLedger, found: Found | None) -> None:
        if recovery.note and (found is None or found.is_of(self._root)):
            self._say(recovery.note)
        if recovery.tokens_undone or recovery.groups_undone:
            since = f"after {found.path.name}" if found is not None else "before the first checkpoint"
            self._say(
                f"undone, because it came {since}: {recovery.tokens_undone:,} tokens and {recovery.groups_undone} "
                "draws, which will be repeated"
            )
        if recovery.unstored_step is not None:
            self._say(
                f"step {recovery.unstored_step} was being generated when the run ended: its tokens were neither stored "
                "nor counted, and the step is repeated"
            )


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``state.json``. Raises RunError if it cannot be read."""
    try:
        state = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        do = "use another checkpoint"
        raise RunError(explain("checkpoint", f"{folder / STATE_FILE}: {error}", "an intact file", do)) from error
    assert isinstance(state, dict)
    return state


def read_start(run_dir: Path, start_from: Path | None) -> datetime | None:
    """When the run in a directory began, by ``start_from``, else its newest checkpoint that can be read, if any.

    All checkpoints of a run hold the same start; those of versions before 0.2 hold none.
    """
    own = [path for _, path in reversed(checkpoint.all_checkpoints(run_dir / checkpoint.FOLDER))]
    for folder in [start_from] if start_from is not None else own:
        try:
            return datetime.fromisoformat(read_state(folder)["started"])
        except (RunError, KeyError, TypeError, ValueError):
            continue
    return None


# ---- for runs of any kind ------------------------------------------------------------------------------------------


def find_to_resume(root: Path, start_from: Path | None, *, kind: str, say: Say) -> Found | None:
    """The checkpoint ``start_from``, else the newest intact one in ``root``; None: there is none.

    Raises RunError where it is damaged, or belongs to a run of another kind (train, sft).
    """
    if start_from is None:
        newest = checkpoint.newest_intact(root, say)
        if newest is None:
            return None
        name, path = newest
    else:
        named = checkpoint.Name.of(start_from)
        assert named is not None, "the run directory resolves resume=PATH to a checkpoint"
        name, path = named, start_from
        damage = checkpoint.find_damage(path)
        if damage is not None:
            raise RunError(explain("resume", f"{path} ({damage})", "an intact checkpoint", "use resume=auto"))
    found = Found(name=name, path=path, state=read_state(path))
    if kind_of_run(found.state) != kind:
        expected, do = f"one of `rlpost {kind}`", "set name= to another run"
        raise RunError(explain("checkpoint", f"{path}, made by `rlpost {kind_of_run(found.state)}`", expected, do))
    return found


def kind_of_run(state: Mapping[str, Any]) -> str:
    """The command that made the checkpoint: train or sft."""
    return str(state.get("kind", KIND))


def find_changes(found: Found, cfg: Config, harmless: Collection[str] = HARMLESS) -> list[Change]:
    """What the configuration says differently since the checkpoint. Raises RunError in deterministic mode, unless
    ``harmless`` covers all of it."""
    changes = [
        change
        for change in changed_keys((found.path / CONFIG_FILE).read_text(), to_yaml(cfg))
        if not was_left_open(change, deterministic=cfg.deterministic)
    ]
    if cfg.deterministic:
        refuse_changes(changes, harmless)
    return changes


@contextmanager
def reading(found: Found) -> Iterator[None]:
    """Around whatever reads the checkpoint's state: RunError where it is not as this version writes it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # checksums match: from another version
        reason = f"{found.path / STATE_FILE} ({type(error).__name__}: {error})"
        raise RunError(explain("checkpoint", reason, "one of this version", "set resume=never or name=")) from error


def set_aside_later(found: Found, root: Path, *, going_back: bool, say: Say) -> None:
    """Set aside the checkpoints after ``found``, if it is one of ``root``'s. ``going_back``: the user named it."""
    if not found.is_of(root):
        return
    if going_back:
        note_going_back(root.parent, found.path)
    for aside in checkpoint.set_aside_later(root, found.name):
        say(f"a later checkpoint was set aside as {aside}")


def load_trainer(found: Found | None, trainer: PolicyTrainer, *, seed: int) -> None:
    """Restore the trainer and the random states; of a new run, seed them."""
    if found is None:
        random_state.seed_all(seed)
        return
    trainer.load(found.path / TRAINER)
    random_state.set_state(found.state["random"])


def restore_tracker_id(run_dir: Path, found: Found) -> None:
    """The tracker continues the run that it knew when the checkpoint was written."""
    tracker = run_dir / TRACKER_ID
    if not tracker.exists() and found.state.get("tracker_run_id"):
        tracker.write_text(found.state["tracker_run_id"] + "\n")


def read_tracker_id(run_dir: Path) -> str | None:
    tracker = run_dir / TRACKER_ID
    return tracker.read_text().strip() if tracker.exists() else None


def save_is_due(cfg: Config, step: int, *, saved_s: float) -> bool:
    """By steps (and after the last one), or by the time since ``saved_s``, when the last checkpoint was written."""
    settings = cfg.checkpoint
    if settings.every < 0:
        return False
    by_step = step == cfg.steps or (settings.every > 0 and step % settings.every == 0)
    by_time = settings.every_minutes > 0 and time.monotonic() - saved_s >= 60 * settings.every_minutes
    return by_step or by_time


def write(file: Path, text: str) -> None:
    file.write_text(text)


def save_model_files(trainer: PolicyTrainer, tokenizer: Any, folder: Path) -> None:
    trainer.save_config(folder)
    tokenizer.save_pretrained(str(folder))

"""``rlpost export RUN OUT``: a run's model as a Hugging Face folder, from its newest intact checkpoint.

Only reads files; the run may still be active. Called by ``cli``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rlpost.durable import checkpoint
from rlpost.durable.run_dir import FINISHED
from rlpost.durable.run_state import CONFIG_FILE, MODEL_FILES, TRAINER, kind_of_run, read_state
from rlpost.errors import RunError, explain
from rlpost.reporting.model_card import model_card, supervised_card

CARD = "README.md"


def export(run: Path, out: Path, *, step: int | None = None, say: Callable[[str], None] = print) -> Path:
    """Write the model of the checkpoint after ``step`` steps (None: the newest intact one) to the new or empty folder
    ``out``; returns the checkpoint it came from. ``run`` may also be a checkpoint's folder.

    Raises:
        RunError: no such checkpoint, only damaged ones, or ``out`` is not empty or cannot be written.
    """
    out = out.absolute()
    folder = _choose(run, step, say)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(explain("export", f"{out}, which exists", "a new or empty folder", "choose another one"))
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    from rlpost.train.saved_weights import write_model

    try:
        card = _card(folder)
        write_model(folder / TRAINER, folder / MODEL_FILES, partial)
        (partial / CARD).write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except FileNotFoundError as error:  # in an active run, checkpoints come and go
        do = "run it again, or name a step that is kept"
        raise RunError(explain("export", f"{error.filename} is gone", "a checkpoint that is kept", do)) from error
    except OSError as error:
        do = f"{error.strerror}; free space or choose another folder"
        raise RunError(explain("export", str(out), "a folder that can be written", do)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _card(folder: Path) -> str:
    state, config = read_state(folder), yaml.safe_load((folder / CONFIG_FILE).read_text())
    totals = state["history"]["totals"]
    write_card = supervised_card if kind_of_run(state) == "sft" else model_card
    return write_card(config, step=state["step"], evaluations=_evaluations(folder, state), totals=totals)


def _evaluations(folder: Path, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The evaluations stored in the checkpoint; for a finished run's last checkpoint, also the one after it."""
    finished = folder.parent.parent / FINISHED
    if finished.is_file():
        summary = json.loads(finished.read_text())
        if summary["steps"] == state["step"]:
            return list(summary["evaluations"])
    return list(state["history"]["evaluations"])


def _choose(run: Path, step: int | None, say: Callable[[str], None]) -> Path:
    named = checkpoint.Name.of(run.resolve())
    if named is not None:
        found = [(named, run)]
    else:
        root = run / checkpoint.FOLDER
        found = [(name, p) for name, p in checkpoint.all_checkpoints(root) if step in (None, name.step)]
    if not found:
        what = f"no checkpoint{f' after step {step}' if step is not None else ''}"
        raise RunError(explain("export", f"{run} ({what})", "a run directory or a checkpoint", "check the path"))
    intact = checkpoint.last_intact(found, say)
    if intact is None:
        raise RunError(explain("export", f"{run} ({len(found)} damaged)", "an intact checkpoint", "name another step"))
    return intact[1]

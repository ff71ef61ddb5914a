"""``rlpost export RUN OUT``: a run's model as a Hugging Face folder, from its newest sound checkpoint.

Reads files only; a run may be going on in the same directory. Called by ``cli``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlpost.durable import checkpoint
from rlpost.durable.run_dir import FINISHED
from rlpost.durable.run_state import CONFIG_FILE, MODEL_FILES, TRAINER, read_state
from rlpost.errors import RunError, explain
from rlpost.reporting.model_card import model_card

CARD = "README.md"


def export(run: Path, out: Path, *, step: int | None = None) -> Path:
    """Write the model of the checkpoint after ``step`` steps (None: the newest) to the new or empty folder ``out``;
    returns the checkpoint it came from. ``run`` may be a checkpoint's folder, too.

    Raises:
        RunError: no such checkpoint, a damaged one, or ``out`` holds something.
    """
    folder = _choose(run, step)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(explain("export", f"{out}, which is there", "a new or an empty folder", "choose another one"))
    state = read_state(folder)
    config = yaml.safe_load((folder / CONFIG_FILE).read_text())
    card = model_card(
        config,
        step=state["step"],
        evaluations=_evaluations(folder, state),
        totals=state["history"]["totals"],
    )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    from rlpost.train.saved_weights import write_model

    try:
        write_model(folder / TRAINER, folder / MODEL_FILES, partial)
        (partial / CARD).write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        do = f"{error.strerror}; free space or choose another folder"
        raise RunError(explain("export", str(out), "a folder that can be written", do)) from error
    return folder


def _evaluations(folder: Path, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those the checkpoint knows; of a finished run's last checkpoint also the one that came after it."""
    finished = folder.parent.parent / FINISHED
    if finished.is_file():
        summary = json.loads(finished.read_text())
        if summary["steps"] == state["step"]:
            return list(summary["evaluations"])
    return list(state["history"]["evaluations"])


def _choose(run: Path, step: int | None) -> Path:
    if checkpoint.Name.of(run.resolve()) is not None:
        found = [run]
    else:
        root = run / checkpoint.FOLDER
        found = [p for name, p in checkpoint.all_checkpoints(root) if step in (None, name.step)]
    if not found:
        what = f"no checkpoint{f' after step {step}' if step is not None else ''}"
        raise RunError(explain("export", f"{run} ({what})", "a run directory or a checkpoint", "check the path"))
    damage = checkpoint.find_damage(found[-1])
    if damage is not None:
        do = "name an older one with --step"
        raise RunError(explain("export", f"{found[-1]} ({damage})", "a sound checkpoint", do))
    return found[-1]

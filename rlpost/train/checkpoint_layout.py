"""What of a trainer's checkpoint must be as it was written: ranks, ZeRO stage, dtype. Light: no torch.

DeepSpeed partitions its state by rank and stage. A resume with others is refused, before a device is touched;
``rlpost export`` makes a model of the checkpoint, from which a new run can start with any number of ranks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpost.errors import RunError, explain

FILE = "trainer.json"
_OF_A_RANK = re.compile(r"(?:zero_pp_rank_|random-state-rank)(\d+)")  # DeepSpeed's names, and the trainer's
DEEPSPEED = "ds"  # DeepSpeed's subfolder of a trainer checkpoint


def describe(*, world: int, zero_stage: int | None, dtype: str) -> dict[str, Any]:
    assert zero_stage is not None, "resolved"
    return {"world": world, "zero_stage": zero_stage, "dtype": dtype}


def write_layout(folder: Path, layout: Mapping[str, Any]) -> None:
    (folder / FILE).write_text(json.dumps(dict(layout)))


def read_layout(folder: Path) -> dict[str, Any]:
    """Raises RunError where no trainer checkpoint is."""
    if not (folder / FILE).is_file():
        raise RunError(explain("trainer checkpoint", str(folder), f"a folder with {FILE}", "check the path"))
    layout = json.loads((folder / FILE).read_text())
    assert isinstance(layout, dict)
    return layout


def check_layout(folder: Path, layout: Mapping[str, Any]) -> None:
    """Raises RunError when the trainer checkpoint in ``folder`` is not there or was written under another layout."""
    written = read_layout(folder)
    if written != layout:
        do = "resume with the settings it was written with, or start a new run from the model of `rlpost export`"
        raise RunError(explain("trainer checkpoint", dict(layout), str(written), do))


def rank_of_file(name: str) -> int | None:
    """The rank that alone needs a file of a trainer checkpoint; None where all need it."""
    match = _OF_A_RANK.search(name)
    return int(match[1]) if match else None

"""A trainer's state kept outside its process, in a folder in memory, so that it survives the process's death.

ZeRO spreads the optimizer's state over the ranks: losing one worker loses its share, and the process group with it.
After each update every rank writes its share here; fresh workers load it and continue from there. The cost is host
memory: two copies of the state, the last one and the one being written. Ranks on one machine share the folder; with
several machines each has its own, and a machine that is lost takes its ranks' shares with it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

PREFIX = "rlpost-shards"
COPIES = 2  # the last one, and the one being written
BYTES_PER_PARAM = 16  # weights, master weights and AdamW's two moments, at most 4 bytes each
WRITTEN = "written-by-rank"


def attempt_dir(parent: str, prefix: str, run_dir: Path) -> Path:
    """A folder in ``parent`` for one attempt of a run, so that late cleanup of a killed one cannot hit the next one's.

    The name up to the last dash is the same in all attempts of the run.
    """
    name = hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=8).hexdigest()
    return Path(parent) / f"{prefix}-{os.getuid()}-{name}-{secrets.token_hex(4)}"


def clear_attempts(folder: Path) -> None:
    """Remove a folder of :func:`attempt_dir`, and those of the run's other attempts beside it."""
    for attempt in folder.parent.glob(folder.name.rpartition("-")[0] + "-*"):
        shutil.rmtree(attempt, ignore_errors=True)


class KeptShards:
    """One rank's view of a folder that all ranks of this machine share.

    Args:
        attempt: the folder of this attempt (``attempt_dir``), with the same name on all machines.
        rank: this rank.
        machine: identifies this machine; two of them on one host, as in tests, share nothing either.
    """

    def __init__(self, attempt: Path, rank: int, machine: str = "") -> None:
        self.attempt, self.root, self.rank = attempt, attempt / machine, rank

    def folder(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def has_room(self, num_params: int) -> bool:
        """Whether the folder's file system has room for the kept states, whatever ranks are on this machine."""
        self.root.mkdir(parents=True, exist_ok=True)
        held = sum(f.stat().st_size for f in self.root.rglob("*") if f.is_file())
        return shutil.disk_usage(self.root).free + held >= COPIES * BYTES_PER_PARAM * num_params

    def write(self, step: int, save: Callable[[Path], None]) -> None:
        """Keep the state after ``step`` steps; collective, like ``save``."""
        folder = self.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / f"{WRITTEN}-{self.rank}"
        written.unlink(missing_ok=True)
        save(folder)
        written.touch()

    def drop_before(self, step: int) -> None:
        """Remove states that no recovery needs any more, once every rank has written ``step``."""
        for other in self._all():
            if other < step:
                shutil.rmtree(self.folder(other), ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that this rank has written completely."""
        return sorted(s for s in self._all() if (self.folder(s) / f"{WRITTEN}-{self.rank}").exists())

    def clear(self) -> None:
        """Remove what any attempt of the run left on this machine."""
        clear_attempts(self.attempt)

    def _all(self) -> list[int]:
        return [int(p.name.removeprefix("step-")) for p in self.root.glob("step-*")]

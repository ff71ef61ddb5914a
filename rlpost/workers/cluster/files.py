"""Transfers files between the controller's disk and workers without shared storage, in bounded pieces through Ray.

Every rank writes its part of a checkpoint on its own machine, and the parts are gathered in the run's folder; on resume
each rank gets back what it needs. Also checks whether there is shared storage at all. The first functions run where the
files are, as methods of a worker; the rest run on the controller. Ray is not imported here.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.errors import RunError, explain
from rlpost.train.checkpoint_layout import rank_of_file
from rlpost.workers.cluster.shards import WRITTEN

PIECE_BYTES = 32 << 20  # of a file, held in Ray's object store at a time

Call = Callable[..., list[Any]]  # Actors.call


# ---- on a worker ---------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> dict[str, int]:
    """Bytes of each file below ``folder``, by its relative path; empty if there is no such folder."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def read_piece(file: Path, offset: int, size: int) -> bytes:
    with open(file, "rb") as opened:
        opened.seek(offset)
        return opened.read(size)


def write_piece(file: Path, offset: int, piece: bytes) -> None:
    """Pieces of a file come in order; the first one starts the file over."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "r+b" if offset else "wb") as opened:
        opened.seek(offset)
        opened.write(piece)


def remove_files(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def answer_probe(folder: Path, token: str, rank: int) -> bool:
    """Whether the controller's probe is visible here; if so, leave this rank's own file beside it."""
    if not (folder / _probe(token)).exists():
        return False
    (folder / _probe(token, rank)).touch()
    return True


# ---- on the controller ---------------------------------------------------------------------------------------------


def _probe(token: str, rank: int | None = None) -> str:
    return f".probe-{token}" + ("" if rank is None else f"-{rank}")


def check_shared(call: Call, world: int, run_dir: Path, name: Callable[[int], str]) -> None:
    """Raises RunError if a worker's machine and this one do not see each other's files in the run's folder.

    Names are new each time: a network file system may remember for seconds that a name did not exist.
    """
    token = secrets.token_hex(8)
    probe = run_dir / _probe(token)
    try:
        probe.touch()
        seen = call("answer_probe", run_dir, token)
        answered = [(run_dir / _probe(token, rank)).exists() for rank in range(world)]
    finally:
        for file in run_dir.glob(f"{_probe(token)}*"):
            file.unlink(missing_ok=True)
    apart = [name(rank) for rank in range(world) if not (seen[rank] and answered[rank])]
    if apart:
        do = "put runs_dir on storage that all machines share, or set cluster.shared_storage=false"
        got = f"{run_dir} is a different folder for {', '.join(apart)}"
        raise RunError(explain("cluster.shared_storage=true", got, "one folder for all machines", do))


def copy_common(call: Call, folders: Sequence[Path], machines: Sequence[str]) -> None:
    """Copy what rank 0 wrote for all ranks into the folder of one rank on each other machine.

    folders: of a trainer's state, by rank; ranks on one machine share one. machines: each rank's.
    """
    first_on = {machine: rank for rank, machine in reversed(list(enumerate(machines)))}
    others = [rank for machine, rank in first_on.items() if machine != machines[0]]
    if not others:
        return
    (listing,) = call("list_files", folders[0], only=[0])
    for name, size in listing.items():
        if rank_of_file(name) is not None or name.startswith(WRITTEN):
            continue
        for offset in pieces_of(size):
            (piece,) = call("read_piece", folders[0] / name, offset, PIECE_BYTES, only=[0])
            for rank in others:
                call("write_piece", folders[rank] / name, offset, piece, only=[rank])


def pieces_of(size: int, piece_bytes: int = PIECE_BYTES) -> Sequence[int]:
    """Offsets of a file's pieces; an empty file is one piece."""
    return range(0, size, piece_bytes) or (0,)


class Courier:
    """Carries folders between this machine and a scratch folder of each worker.

    Args:
        call: calls a method of every worker; see ``cluster.actors.Actors.call``.
        world: number of workers.
        scratch: folder on each worker's machine, with a subfolder for every rank.
        piece_bytes: of a file, at a time.
    """

    def __init__(self, call: Call, *, world: int, scratch: Path, piece_bytes: int = PIECE_BYTES) -> None:
        self._call, self._world, self._scratch, self._piece_bytes = call, world, scratch, piece_bytes

    def folders(self) -> list[Path]:
        """Each rank's scratch folder."""
        return [self._scratch / f"rank-{rank}" for rank in range(self._world)]

    def clear(self) -> None:
        self._call("remove_files", per_rank=[(folder,) for folder in self.folders()])

    def fetch(self, folder: Path) -> None:
        """Move the contents of all ranks' scratch folders into ``folder`` here."""
        folder.mkdir(parents=True, exist_ok=True)
        listings: list[Mapping[str, int]] = self._call("list_files", per_rank=[(f,) for f in self.folders()])
        for rank, (source, listing) in enumerate(zip(self.folders(), listings, strict=True)):
            for name, size in listing.items():
                for offset in pieces_of(size, self._piece_bytes):
                    arguments = source / name, offset, self._piece_bytes
                    (piece,) = self._call("read_piece", *arguments, only=[rank])
                    write_piece(folder / name, offset, piece)
        self.clear()

    def bring(self, folder: Path) -> None:
        """Copy what each rank needs from ``folder`` here into its scratch folder."""
        self.clear()
        for name, size in list_files(folder).items():
            owner = rank_of_file(name)
            ranks = range(self._world) if owner is None else [owner] if owner < self._world else []
            for offset in pieces_of(size, self._piece_bytes):
                piece = read_piece(folder / name, offset, self._piece_bytes)
                for rank in ranks:
                    self._call("write_piece", self.folders()[rank] / name, offset, piece, only=[rank])

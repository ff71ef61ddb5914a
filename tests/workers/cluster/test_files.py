"""Files between machines that share nothing: whole, in pieces, to whom they belong; and whether anything is shared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rlpost.errors import RunError
from rlpost.workers.cluster import files
from rlpost.workers.cluster.files import Courier, check_shared, copy_common

CHECKPOINT = {  # DeepSpeed's names at stages 1 and 3, the trainer's own, a file without a byte
    "trainer.json": b"{}",
    "ds/mp_rank_00_model_states.pt": b"weights" * 100,
    "ds/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"zero" * 33,
    "ds/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": b"one" * 41,
    "ds/zero_pp_rank_11_mp_rank_00_model_states.pt": b"eleven",
    "random-state-rank0.pt": b"0",
    "random-state-rank1.pt": b"1",
    "empty": b"",
}


class Machines:
    """Stands for workers on machines of their own: a path of rank r lies below ``machine-r``. ``Actors.call`` on it."""

    def __init__(self, root: Path, world: int) -> None:
        self.root, self.world = root, world
        self.largest = 0

    def at(self, rank: int, path: Path) -> Path:
        return self.root / f"machine-{rank}" / path.relative_to("/")

    def __call__(self, method: str, *arguments: Any, per_rank: Any = None, only: Any = None) -> list[Any]:
        ranks = range(self.world) if only is None else only
        return [self._call(r, method, *(arguments if per_rank is None else per_rank[r])) for r in ranks]

    def _call(self, rank: int, method: str, path: Path, *rest: Any) -> Any:
        extra = (rank,) if method == "answer_probe" else ()
        answer = getattr(files, method)(self.at(rank, path), *rest, *extra)
        passed = [len(x) for x in (answer, *rest) if isinstance(x, bytes)]
        self.largest = max(self.largest, *passed, 0)
        return answer


def write(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files.list_files(folder)}


def test_each_rank_gets_what_it_needs_of_a_checkpoint_and_all_of_it_comes_together_again(tmp_path: Path) -> None:
    machines = Machines(tmp_path, world=2)
    courier = Courier(machines, world=2, scratch=Path("/scratch"), piece_bytes=64)
    write(tmp_path / "checkpoint", CHECKPOINT)
    courier.bring(tmp_path / "checkpoint")
    theirs = [read(machines.at(rank, folder)) for rank, folder in enumerate(courier.folders())]
    common = {"trainer.json", "ds/mp_rank_00_model_states.pt", "empty"}
    own = ["ds/zero_pp_rank_0_mp_rank_00_optim_states.pt", "ds/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"]
    for rank in (0, 1):
        assert set(theirs[rank]) == common | {own[rank], f"random-state-rank{rank}.pt"}
        assert all(theirs[rank][name] == CHECKPOINT[name] for name in theirs[rank])
    courier.fetch(tmp_path / "gathered")
    assert read(tmp_path / "gathered") == {n: c for n, c in CHECKPOINT.items() if "rank_11" not in n}
    assert 0 < machines.largest <= 64, "no piece is larger than asked for"
    assert not any(machines.at(rank, folder).exists() for rank, folder in enumerate(courier.folders()))


def test_a_file_written_over_keeps_nothing_of_the_longer_one_before(tmp_path: Path) -> None:
    files.write_piece(tmp_path / "file", 0, b"a long one")
    files.write_piece(tmp_path / "file", 0, b"sho")
    files.write_piece(tmp_path / "file", 3, b"rt")
    assert (tmp_path / "file").read_bytes() == b"short"


def test_machines_without_rank_0_get_what_it_wrote_for_all_and_nobody_s_shares(tmp_path: Path) -> None:
    machines = Machines(tmp_path, world=4)
    folders = [Path("/kept/a"), Path("/kept/a"), Path("/kept/b"), Path("/kept/b")]
    write(machines.at(0, folders[0]), {**CHECKPOINT, "written-by-rank-0": b""})
    write(machines.at(2, folders[2]), {"ds/zero_pp_rank_2_mp_rank_00_optim_states.pt": b"two"})
    copy_common(machines, folders, ["a", "a", "b", "b"])
    assert set(read(machines.at(2, folders[2]))) == {
        *("trainer.json", "ds/mp_rank_00_model_states.pt", "empty"),
        "ds/zero_pp_rank_2_mp_rank_00_optim_states.pt",
    }
    assert not machines.at(3, folders[3]).exists(), "once for each machine"


def test_a_folder_that_all_see_passes_and_no_probe_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()

    def call(method: str, folder: Path, token: str) -> list[bool]:
        return [files.answer_probe(folder, token, rank) for rank in range(2)]

    check_shared(call, 2, run, str)
    assert not list(run.iterdir())


@pytest.mark.parametrize("has_folder", [True, False])
def test_a_machine_with_another_folder_is_named_with_what_to_do(tmp_path: Path, has_folder: bool) -> None:
    run = tmp_path / "run"
    run.mkdir()
    machines = Machines(tmp_path, world=2)
    machines.at(0, run).parent.mkdir(parents=True)
    machines.at(0, run).symlink_to(run)
    if has_folder:
        machines.at(1, run).mkdir(parents=True)
    with pytest.raises(
        RunError, match=r"cluster.shared_storage.*a different folder for worker 1'.*shared_storage=false"
    ):
        check_shared(machines, 2, run, lambda rank: f"worker {rank}")
    assert not list(run.iterdir())
    shutil.rmtree(tmp_path / "machine-0")


def test_a_machine_whose_files_are_not_seen_here_is_named(tmp_path: Path) -> None:
    """It sees the controller's folder as it was when it was copied."""
    run = tmp_path / "run"
    run.mkdir()

    def call(method: str, folder: Path, token: str) -> list[bool]:
        copied = shutil.copytree(folder, tmp_path / "copy")
        return [files.answer_probe(folder, token, 0), files.answer_probe(copied, token, 1)]

    with pytest.raises(RunError, match="a different folder for 1'"):
        check_shared(call, 2, run, str)

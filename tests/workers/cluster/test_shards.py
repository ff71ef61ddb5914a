"""The trainer's state outside its process: whole or not there, the last one only, gone at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlpost.workers.cluster.shards import PREFIX, KeptShards, attempt_dir


def save(folder: Path) -> None:
    (folder / "state").write_bytes(b"x" * 1000)


def test_a_step_counts_for_a_rank_only_when_that_rank_wrote_it_to_the_end(tmp_path: Path) -> None:
    first, second = KeptShards(tmp_path / "kept-1", 0), KeptShards(tmp_path / "kept-1", 1)
    first.write(3, save)
    assert (first.steps(), second.steps()) == ([3], [])

    def fail(folder: Path) -> None:
        raise OSError("killed in the middle")

    with pytest.raises(OSError):
        first.write(4, fail)
    with pytest.raises(OSError):
        first.write(3, fail)
    assert first.steps() == [], "a state that was being written over is whole no more"


def test_older_states_go_once_all_have_the_newer_one(tmp_path: Path) -> None:
    kept = KeptShards(tmp_path / "kept-1", 0)
    for step in (1, 2, 3):
        kept.write(step, save)
    kept.drop_before(3)
    assert kept.steps() == [3]
    kept.clear()
    assert kept.steps() == [] and not (tmp_path / "kept-1").exists()


def test_room_is_two_copies_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptShards(tmp_path / "kept-1", 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 32_000})())
    assert kept.has_room(1000) and not kept.has_room(1001)
    kept.write(1, save)
    assert kept.has_room(1001), "what is kept already counts as room: it is written over"


def test_a_life_has_a_folder_of_its_own_and_clears_those_of_the_run_s_earlier_ones(
    tmp_path: Path,
) -> None:
    first, second, other = (
        attempt_dir(str(tmp_path), PREFIX, tmp_path / name) for name in ("x/../run", "run", "other")
    )
    assert len({first, second, other}) == 3
    for folder in (first, other):
        KeptShards(folder, 0).write(1, save)
    KeptShards(second, 0).clear()
    assert not first.exists() and other.exists()

"""A checkpoint is there whole or not at all."""

import errno

import pytest
import torch

from rlpost import checkpoint
from rlpost.errors import RunError


def save(root, step, content="x", keep_last=2):
    def save_trainer(folder):
        folder.mkdir()
        (folder / "weights").write_text(content)

    return checkpoint.save(root, step, {"step": step}, save_trainer, keep_last=keep_last)


def test_the_newest_are_kept_and_read_back(tmp_path):
    for step in (2, 4, 10):
        save(tmp_path, step)
    assert [p.name for p in checkpoint.whole(tmp_path)] == ["step-000004", "step-000010"]
    assert checkpoint.read_state(checkpoint.whole(tmp_path)[-1]) == {"step": 10}
    assert (tmp_path / "step-000010/trainer/weights").read_text() == "x"


@pytest.mark.parametrize("damage", [b"", b'{"step": 1', b"\xff", b"[]"])
def test_a_damaged_state_names_the_folder_and_what_to_do(tmp_path, damage):
    folder = save(tmp_path, 4)
    (folder / "state.json").write_bytes(damage)
    with pytest.raises(RunError, match="step-000004.*delete .*step-000004 to resume from the checkpoint before"):
        checkpoint.read_state(folder)


def test_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 2, "old")
    save(tmp_path, 2, "new")
    assert (tmp_path / "step-000002/trainer/weights").read_text() == "new"


def test_a_full_disk_leaves_the_one_before(tmp_path):
    save(tmp_path, 2, keep_last=1)

    def full(folder):
        folder.mkdir()
        (folder / "half").write_text("...")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="No space left on device.*run again to resume"):
        checkpoint.save(tmp_path, 4, {"step": 4}, full, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_a_disk_that_fills_under_torch_is_the_same_clear_line(tmp_path):
    """torch.save has an error of its own for it, here the real one."""

    def full(folder):
        folder.mkdir()
        torch.save(torch.zeros(1 << 16), "/dev/full")

    with pytest.raises(RunError, match="expected a disk with room; .*run again to resume"):
        checkpoint.save(tmp_path, 4, {"step": 4}, full, keep_last=1)
    assert list(tmp_path.iterdir()) == []

    def bug(folder):
        raise RuntimeError("no disk involved")

    with pytest.raises(RuntimeError, match="no disk involved"):
        checkpoint.save(tmp_path, 4, {"step": 4}, bug, keep_last=1)


def test_what_a_killed_process_left_goes_with_the_next_checkpoint(tmp_path):
    (tmp_path / ".partial-000002/trainer").mkdir(parents=True)
    save(tmp_path, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000004"]


def test_a_kill_before_everything_is_on_disk_leaves_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 2)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_sync", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4)
    assert [p.name for p in checkpoint.whole(tmp_path)] == ["step-000002"]


def test_every_file_is_on_disk_before_the_name_appears(tmp_path, monkeypatch):
    synced = []

    def record(path):
        synced.append(path.relative_to(tmp_path).as_posix())
        assert path == tmp_path or not (tmp_path / "step-000002").exists(), "named before it was durable"

    monkeypatch.setattr(checkpoint, "_sync", record)
    save(tmp_path, 2)
    parts = {"", "/trainer", "/trainer/weights", "/state.json"}
    assert set(synced) == {".partial-000002" + part for part in parts} | {"."}


def test_what_a_killed_process_left_is_not_a_checkpoint(tmp_path):
    (tmp_path / ".partial-000004/trainer").mkdir(parents=True)
    assert checkpoint.whole(tmp_path) == []
    save(tmp_path, 4)
    assert [p.name for p in checkpoint.whole(tmp_path)] == ["step-000004"]

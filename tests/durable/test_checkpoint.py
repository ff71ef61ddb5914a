"""A checkpoint is there whole or not at all, and a damaged one is never used."""

import errno
import json
import os

import pytest
import torch

from rlpost.durable import checkpoint
from rlpost.durable.checkpoint import Name
from rlpost.errors import RunError


def save(root, step, content="x", stopped=0):
    def save_trainer(folder):
        folder.mkdir()
        (folder / "weights").write_text(content)

    parts = {"trainer": save_trainer, "state.json": lambda file: file.write_text(json.dumps({"step": step}))}
    return checkpoint.save(root, Name(step, stopped), parts)


def names(root):
    return [path.name for _, path in checkpoint.all_checkpoints(root)]


def newest(root):
    said = []
    found = checkpoint.newest_intact(root, said.append)
    return (found[1].name if found else None), said


def test_names_sort_by_time_and_say_what_they_are(tmp_path):
    assert [str(n) for n in sorted([Name(10), Name(2, 1), Name(2), Name(2, 11)])] == [
        "step-000002",
        "step-000002-stopped-1",
        "step-000002-stopped-11",
        "step-000010",
    ]
    for name in (Name(10), Name(3, 2), Name(1234567)):
        assert Name.of(tmp_path / str(name)) == name
    assert Name.of(tmp_path / "step-2") is None and Name.of(tmp_path / ".partial-step-000002") is None


def test_what_is_saved_is_found_sound(tmp_path):
    for step in (2, 4, 10):
        save(tmp_path, step)
    assert newest(tmp_path) == ("step-000010", [])
    assert (tmp_path / "step-000010/trainer/weights").read_text() == "x"


def damage(folder, how):
    weights = folder / "trainer/weights"
    if how == "cut":
        weights.write_text("")
    elif how == "changed":
        weights.write_text("y")
    elif how == "missing":
        weights.unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "half a manifest":
        raw = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_bytes(raw[: len(raw) // 2])
    elif how == "another format":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))


HOW = {
    "cut": "trainer/weights has 0 bytes, expected 1",
    "changed": "trainer/weights has other bytes",
    "missing": "trainer/weights is missing",
    "no manifest": "no manifest.json",
    "half a manifest": "manifest.json cannot be read",
    "another format": "format 1, but this version of rlpost reads 2",
}


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, how):
    for step in (2, 4):
        save(tmp_path, step)
    damage(tmp_path / "step-000004", how)
    found, (said,) = newest(tmp_path)
    assert found == "step-000002" and "step-000004 is damaged" in said and HOW[how] in said


def test_where_none_is_sound_the_run_does_not_start_over_silently(tmp_path):
    for step in (2, 4):
        damage(save(tmp_path, step), "changed")
    with pytest.raises(RunError, match="2 damaged ones.*resume=never"):
        newest(tmp_path)
    assert newest(tmp_path / "nothing") == (None, [])


def test_the_newest_and_every_nth_are_kept(tmp_path):
    for step in range(1, 11):
        save(tmp_path, step)
    assert checkpoint.clean_up(tmp_path, keep_last=2, keep_every=4) == 4
    assert names(tmp_path) == ["step-000004", "step-000008", "step-000009", "step-000010"]
    assert checkpoint.clean_up(tmp_path, keep_last=1, keep_every=0) == 10
    assert names(tmp_path) == ["step-000010"]


def test_a_stopped_step_is_kept_until_a_later_one_is_saved(tmp_path):
    save(tmp_path, 2)
    for number in (1, 2):
        assert checkpoint.next_name(tmp_path, 2, under_way=True) == Name(2, number)
        save(tmp_path, 2, stopped=number)
        assert checkpoint.clean_up(tmp_path, keep_last=2, keep_every=0) == 2
        assert names(tmp_path) == ["step-000002", f"step-000002-stopped-{number}"]
        assert newest(tmp_path)[0] == f"step-000002-stopped-{number}"
    save(tmp_path, 3)
    checkpoint.clean_up(tmp_path, keep_last=2, keep_every=0)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_what_a_run_goes_back_behind_is_set_aside_not_deleted(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert [p.name for p in checkpoint.set_aside_later(tmp_path, Name(2))] == [
        "set-aside-step-000004",
        "set-aside-step-000006",
    ]
    assert newest(tmp_path)[0] == "step-000002"
    save(tmp_path, 4, "new")
    checkpoint.set_aside_later(tmp_path, Name(2))
    assert (tmp_path / "set-aside-step-000004/trainer/weights").read_text() == "x"
    assert (tmp_path / "set-aside-step-000004-1/trainer/weights").read_text() == "new"


def test_a_full_disk_leaves_the_one_before(tmp_path):
    save(tmp_path, 2)

    def full(folder):
        folder.mkdir()
        (folder / "half").write_text("...")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="No space left on device.*run the same command to resume"):
        checkpoint.save(tmp_path, Name(4), {"trainer": full})
    assert os.listdir(tmp_path) == ["step-000002"]


def test_a_disk_that_fills_under_torch_is_the_same_clear_line(tmp_path):
    """torch.save has an error of its own for it, here the real one."""

    def full(folder):
        folder.mkdir()
        torch.save(torch.zeros(1 << 16), "/dev/full")

    with pytest.raises(RunError, match="expected a disk with room; .*run the same command to resume"):
        checkpoint.save(tmp_path, Name(4), {"trainer": full})
    assert os.listdir(tmp_path) == []

    def bug(folder):
        raise RuntimeError("no disk involved")

    with pytest.raises(RuntimeError, match="no disk involved"):
        checkpoint.save(tmp_path, Name(4), {"trainer": bug})


def test_what_a_killed_process_left_goes_with_the_next_checkpoint(tmp_path):
    (tmp_path / ".partial-step-000002/trainer").mkdir(parents=True)
    assert newest(tmp_path) == (None, [])
    save(tmp_path, 4)
    assert os.listdir(tmp_path) == ["step-000004"]


def test_a_kill_before_everything_is_on_disk_leaves_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 2)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_sync", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4)
    assert names(tmp_path) == ["step-000002"]


def test_every_file_is_on_disk_before_the_name_appears(tmp_path, monkeypatch):
    synced = []

    def record(path):
        synced.append(path.relative_to(tmp_path).as_posix())
        assert path == tmp_path or not (tmp_path / "step-000002").exists(), "named before it was durable"

    monkeypatch.setattr(checkpoint, "_sync", record)
    save(tmp_path, 2)
    parts = {"", "/trainer", "/trainer/weights", "/state.json", "/manifest.json"}
    assert set(synced) == {".partial-step-000002" + part for part in parts} | {"."}
    assert synced[-1] == ".", "the rename itself is made durable"

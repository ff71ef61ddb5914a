"""Where the ledger lies when the run directory is on a network file system."""

from pathlib import Path

import pytest

from rlpost.durable.filesystem import filesystem_type, is_network, ledger_path

MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/vdb /home/local xfs rw 0 0
//box/share /mnt/my\\040share cifs rw 0 0
me@host:/ /mnt/ssh fuse.sshfs rw 0 0
overlay /var/overlay overlay rw 0 0
"""


@pytest.mark.parametrize(
    "path, kind, network",
    [
        ("/data/runs/a", "ext4", False),
        ("/home/me/runs", "nfs4", True),
        ("/home/local/runs", "xfs", False),
        ("/homework", "ext4", False),
        ("/mnt/my share/runs", "cifs", True),
        ("/mnt/ssh/x", "fuse.sshfs", True),
        ("/var/overlay/x", "overlay", False),
    ],
)
def test_the_deepest_mount_counts(path, kind, network):
    assert filesystem_type(Path(path), MOUNTS) == kind and is_network(kind) == network


@pytest.mark.parametrize("kind", ["lustre", "beegfs", "ceph", "9p", "fuse.glusterfs", "nfs"])
def test_file_systems_of_clusters_are_known(kind):
    assert is_network(kind)


def test_on_a_local_disk_the_ledger_lies_in_the_run_directory():
    assert ledger_path(Path("/data/runs/a"), None, mounts=MOUNTS) == (Path("/data/runs/a/ledger.sqlite"), "")


def test_on_a_network_disk_it_lies_in_the_local_cache_and_the_user_is_told(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    path, note = ledger_path(Path("/home/me/runs/a"), None, mounts=MOUNTS)
    assert path.is_relative_to("/var/cache/me/rlpost/ledgers") and path.parent.name.startswith("a-")
    assert "network file system (nfs4)" in note and str(path) in note
    assert ledger_path(Path("/home/you/runs/a"), None, mounts=MOUNTS)[0] != path, "two runs, two ledgers"


def test_a_folder_of_the_users_choice_holds_one_folder_a_run():
    path, note = ledger_path(Path("/home/me/runs/a"), "/scratch", mounts=MOUNTS)
    assert path.parent.parent == Path("/scratch") and path.parent.name.startswith("a-") and note == ""


def test_this_machine_can_be_asked():
    assert filesystem_type(Path(__file__)) != ""

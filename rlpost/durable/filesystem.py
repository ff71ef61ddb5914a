"""Where the ledger is kept: SQLite's write-ahead log needs a local disk, and a run directory may not be on one."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from rlpost.config.locations import expand_home
from rlpost.rollout.ledger import FILE

POINTER = "ledger.location"  # in a run directory whose ledger is elsewhere: its path

# Types in /proc/mounts that are served by another machine, or by a program that may be.
NETWORK_TYPES = re.compile(
    r"nfs|nfs4|cifs|smb3|smbfs|ncpfs|afs|ceph|lustre|gpfs|beegfs|glusterfs|orangefs|pvfs2|9p|virtiofs|"
    r"fuse\.(?!fuse-overlayfs|overlayfs).*"
)


def filesystem_type(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that ``path`` is (or would be) on; "" if unknown.

    ``mounts``: the text of /proc/mounts.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text()
        except OSError:
            return ""
    wanted = path.absolute().resolve()
    best, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        mount = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[1]))
        depth = len(mount.parts)
        if depth >= best and (wanted == mount or mount in wanted.parents):  # a later mount hides an earlier one
            best, kind = depth, fields[2]
    return kind


def is_network(kind: str) -> bool:
    return NETWORK_TYPES.fullmatch(kind) is not None


def ledger_path(run_dir: Path, ledger_dir: str | None, *, mounts: str | None = None) -> tuple[Path, str]:
    """(path of the live ledger, a note for the user or "").

    It is in the run directory; in a folder for this run under ``ledger_dir`` if that is set; and on a local disk if the
    run directory turns out to be on a network file system.
    """
    own = f"{run_dir.name}-{hashlib.blake2b(str(run_dir.absolute()).encode(), digest_size=4).hexdigest()}"
    if ledger_dir is not None:
        return Path(expand_home(ledger_dir)).absolute() / own / FILE, ""
    kind = filesystem_type(run_dir, mounts)
    if not is_network(kind):
        return run_dir / FILE, ""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "rlpost" / "ledgers" / own / FILE
    note = f"{run_dir} is on a network file system ({kind}), where SQLite is not safe: the ledger is {path}"
    return path, note

"""Drops a child's privileges, in the order that works, before it runs a program. Inside the sandbox; standard library.

Called by ``guardian`` in a child that is already the first process of its own pid namespace. After both functions the
process sees an empty private /tmp, no /proc, none of the guardian's files, only the given descriptors, an empty
environment, and can make only the system calls allowed by ``seccomp``.
"""

from __future__ import annotations

import fcntl
import math
import os
import pathlib
import resource
import signal
import sys
from collections.abc import Sequence

from rlpost.sandbox import linux
from rlpost.sandbox.limits import Limits

HERE = str(pathlib.Path(__file__).parents[2])  # what the guardian's command line put on sys.path
HOME = "/guardian"  # the guardian's own files and its /proc; covered in the child
MAX_INODES = 4096
STACK_BYTES = 64 << 20


def keep_only(fds: Sequence[int]) -> None:
    """``fds`` become the descriptors 0, 1, 2, ...; all others are closed."""
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in fds]  # out of the way of their final numbers
    for number, fd in enumerate(moved):
        os.dup2(fd, number)
    linux.close_all_from(len(fds))


def confine(limits: Limits, *, base_bytes: int, filter_code: bytes, namespaces: bool) -> None:
    """``base_bytes``: the address space of the bare interpreter; ``filter_code``: from ``seccomp.assemble``."""
    os.setsid()  # kill(0) reaches a process group through all pid namespaces, and the guardian was in this one
    if namespaces:
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWIPC)
        linux.mount_tmpfs("/tmp", f"size={limits.tmp_bytes},nr_inodes={MAX_INODES},mode=0700")
        linux.mount_tmpfs(HOME, "size=4k,nr_inodes=1", read_only=True)
        os.chdir("/tmp")
    os.umask(0o077)
    os.environ.clear()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.set_int_max_str_digits(0)  # a program may print what it computes; its CPU time is limited
    _limit(limits, base_bytes)
    if namespaces:
        linux.drop_capabilities()
    linux.install_filter(filter_code)
    _forget()


def _limit(limits: Limits, base_bytes: int) -> None:
    cpu_s = math.ceil(limits.cpu_s) + 1  # whole seconds; the guardian's own clock is finer and acts first
    for what, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, base_bytes + limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.output_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_NPROC, limits.threads),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        most = resource.getrlimit(what)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(what, (value, value))


def _forget() -> None:
    """Remove what a fresh interpreter would not have loaded."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("rlpost", "ctypes", "_ctypes")]:
        del sys.modules[name]
    sys.path.remove(HERE)
    sys.argv[:] = ["program.py"]
    sys.dont_write_bytecode = True

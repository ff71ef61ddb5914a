"""The Linux calls that Python 3.11 has no function for, through ctypes. Inside the sandbox only; standard library only.

Each function raises OSError if the kernel refuses: nothing here degrades silently.
"""

from __future__ import annotations

import ctypes
import os
import time

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x08000000, 0x10000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")


def unshare(flags: int) -> None:
    _call("unshare", ctypes.c_int(flags))


def set_namespace(fd: int, kind: int) -> None:
    _call("setns", ctypes.c_int(fd), ctypes.c_int(kind))


def mount_tmpfs(target: str, options: str, *, read_only: bool = False) -> None:
    flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if read_only else 0)
    _call("mount", b"tmpfs", target.encode(), b"tmpfs", ctypes.c_ulong(flags), options.encode())


def set_process_control(option: int, value: int) -> None:
    """prctl with one argument."""
    zero = ctypes.c_ulong(0)
    _call("prctl", ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero)


def drop_capabilities() -> None:
    """Empties the effective, permitted and inheritable sets."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _call("capset", header, (ctypes.c_uint32 * 6)())


def install_filter(code: bytes) -> None:
    """Attaches a seccomp filter (``seccomp.assemble``) permanently to this process and all it starts."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]

    set_process_control(PR_SET_NO_NEW_PRIVS, 1)
    program = Program(len(code) // 8, code)
    _call("prctl", ctypes.c_int(PR_SET_SECCOMP), ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program))


def close_all_from(first: int) -> None:
    """Closes every descriptor from ``first`` on."""
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def cpu_seconds(pid: int) -> float:
    """CPU time another process has used so far, over all its threads; 0 if it has ended."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the clock id that clock_getcpuclockid(3) derives from a pid
    except OSError:
        return 0.0

"""The command line that puts the guardian into a sandbox, and the one that runs it without (unsafe). Host side.

The root is an empty read-only tmpfs that contains: ``/python`` (executable, standard library, shared libraries), the
dynamic loader, ``/dev/null``, ``zero``, ``random`` and ``urandom``, an empty ``/tmp``, and ``/guardian`` (this folder
and a /proc), which the guardian covers before a program runs. All namespaces are new; there is no network, not even a
route.

When run as root, bubblewrap uses root's privileges for the mounts, and the guardian then becomes ``nobody``, so that no
program is root outside its namespace (the kernel exempts root from the limit on processes). Otherwise bubblewrap
creates a user namespace.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from rlpost.errors import ConfigError, explain
from rlpost.sandbox.interpreter import Interpreter, find_interpreter

PACKAGE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "PATH": "/python/bin",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",  # sets have the same order every time, so outcomes are reproducible
    "PYTHONDONTWRITEBYTECODE": "1",
    "MALLOC_ARENA_MAX": "1",  # otherwise each thread reserves 64 MiB of the limited address space
}
DEVICES = ("null", "zero", "random", "urandom")
UNSAFE_OPTION = "reward.args.allow_unsafe_execution_without_sandbox"


def find_bubblewrap() -> str:
    """The path of ``bwrap``. Raises ConfigError that says what to install."""
    found = shutil.which("bwrap")
    if found is None:
        do = f"install the package bubblewrap (Debian: apt install bubblewrap), or set {UNSAFE_OPTION}=true"
        raise ConfigError(explain("sandbox", "no bwrap on PATH", "bubblewrap, to isolate the model's code", do))
    return found


def sandboxed_command(control_fd: int) -> list[str]:
    command = [
        find_bubblewrap(),
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--hostname",
        "sandbox",
    ]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session"]
    if os.getuid() != 0:
        command += ["--unshare-user"]
    python = find_interpreter()
    environment = ENVIRONMENT | {"PYTHONHOME": "/python", "LD_LIBRARY_PATH": "/python/libraries"}
    for name, value in environment.items():
        command += ["--setenv", name, value]
    binds = _binds(python) + ["--ro-bind", str(PACKAGE), "/guardian/rlpost/sandbox"]
    for parent in _parents(binds[2::3]):
        command += ["--dir", parent]  # bubblewrap would create them itself, closed to everyone but root
    command += binds
    for device in DEVICES:
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for folder in python.hidden:
        inside = f"/python/{folder.relative_to(python.prefix)}"
        command += ["--tmpfs", inside, "--remount-ro", inside]
    command += ["--proc", "/guardian/proc", "--dir", "/tmp", "--remount-ro", "/", "--chdir", "/"]
    return [*command, "/python/bin/python", *guardian_arguments("/guardian", control_fd, namespaces=True)]


def _binds(python: Interpreter) -> list[str]:
    """``--ro-bind SOURCE DESTINATION``, repeated."""
    arguments = ["--ro-bind", str(python.executable), "/python/bin/python"]
    for folder in python.folders:
        arguments += ["--ro-bind", str(folder), f"/python/{folder.relative_to(python.prefix)}"]
    for name, path in python.libraries.items():
        arguments += ["--ro-bind", str(path), f"/python/libraries/{name}"]
    return [*arguments, "--ro-bind", str(python.loader), str(python.loader)]


def _parents(paths: list[str]) -> list[str]:
    """Every folder above ``paths`` and ``/dev``, from the top."""
    found = {"/dev", *(str(folder) for path in paths for folder in Path(path).parents)} - {"/"}
    return sorted(found)


def unsafe_command(control_fd: int) -> list[str]:
    """The guardian on the bare host: limits and the system call filter apply, but there are no namespaces."""
    return [sys.executable, *guardian_arguments(str(PACKAGE.parents[1]), control_fd, namespaces=False)]


def unsafe_environment() -> dict[str, str]:
    return dict(ENVIRONMENT)


def guardian_arguments(path: str, control_fd: int, *, namespaces: bool) -> list[str]:
    code = f"import sys; sys.path.insert(0, {path!r}); from rlpost.sandbox.guardian import main"
    return ["-S", "-s", "-P", "-c", f"{code}; main({control_fd}, {namespaces})"]

"""What a bare Python interpreter consists of: the executable, its standard library, the shared libraries of both.

Host side. Finds the files of the interpreter that runs rlpost (outside its virtual environment); ``bubblewrap`` binds
them, and nothing else of the host, into the sandbox.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from rlpost.errors import ConfigError, explain

# "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)", and the loader, which is listed alone
_NEEDED = re.compile(r"^\s*(\S+) => (/\S+) \(0x", re.MULTILINE)
_LOADER = re.compile(r"^\s*(/\S*ld-\S+) \(0x", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpreter:
    executable: Path
    prefix: Path
    folders: tuple[Path, ...]  # of the standard library, below ``prefix``
    hidden: tuple[Path, ...]  # installed packages, below ``folders``
    libraries: dict[str, Path]  # by the name under which they are loaded
    loader: Path  # at the only path where the kernel looks for it


@functools.cache
def find_interpreter() -> Interpreter:
    """The running Python's. Raises ConfigError if the files cannot be found."""
    executable = Path(getattr(sys, "_base_executable", "") or sys.executable).resolve()
    prefix = Path(sys.base_prefix).resolve()
    folders = {
        Path(sysconfig.get_path(name, vars={"base": str(prefix), "platbase": str(prefix)})).resolve()
        for name in ("stdlib", "platstdlib")
    }
    folders = {folder for folder in folders if folder.is_dir() and folder.is_relative_to(prefix)}
    if not executable.is_file() or not folders:
        raise ConfigError(explain("sandbox", str(executable), "an interpreter with a standard library", "reinstall it"))
    binaries = [executable, *(file for folder in sorted(folders) for file in sorted(folder.glob("lib-dynload/*.so")))]
    listing = _list_libraries(binaries)
    loaders = _LOADER.findall(listing)
    if not loaders:
        raise ConfigError(explain("sandbox", str(executable), "a program with a dynamic loader", "use another Python"))
    return Interpreter(
        executable=executable,
        prefix=prefix,
        folders=tuple(sorted(folders)),
        hidden=tuple(
            folder / name
            for folder in sorted(folders)
            for name in ("site-packages", "dist-packages")
            if (folder / name).is_dir()
        ),
        libraries={name: Path(path).resolve() for name, path in _NEEDED.findall(listing) if "/" not in name},
        loader=Path(loaders[0]),
    )


def _list_libraries(binaries: list[Path]) -> str:
    """What the loader would load for ``binaries``, transitively. A module with a missing library is left to fail."""
    try:
        done = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        do = "install libc-bin, which has ldd"
        raise ConfigError(explain("sandbox", f"ldd: {error}", "a list of the interpreter's libraries", do)) from None
    return done.stdout

"""Compilers, memory, shared memory and disks. Everything that is looked at is passed in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from rlpost.config import Config
from rlpost.doctor.findings import Finding, of_error, ok, problem, skipped, warning
from rlpost.errors import ConfigError, UserError
from rlpost.preflight.checks import check_run_directory
from rlpost.preflight.device_plan import format_bytes
from rlpost.rewards.selection import list_functions

GIB = 1 << 30
COMPILED_ON_CPU = "models with a vocabulary of 32,768 tokens or more need it"  # workers.runtime.SMALL_VOCABULARY
FEW_BYTES = GIB  # below this not even the demo: a process with torch and vLLM takes 0.6 GiB before a model (measured)
LITTLE_MEMORY, LITTLE_DISK, LITTLE_SHM = 2 * GIB, 5 * GIB, GIB // 2
CHECKPOINT_BYTES = 16  # per parameter: the trainer's state in a checkpoint
DOWNLOAD_BYTES = 2  # per parameter: weights in bfloat16
SANDBOXED = ("code_functions", "code_stdio")


class Usage(NamedTuple):
    total: int  # bytes
    free: int


Look = Callable[[Path], Usage]


def look(folder: Path) -> Usage:
    usage = shutil.disk_usage(folder)
    return Usage(usage.total, usage.free)


# ---- compilers -----------------------------------------------------------------------------------------------------


def check_compiler(name: str, variable: str, environment: Mapping[str, str], device: str) -> Finding:
    """``variable``: CC or CXX, which names another compiler than ``name``."""
    wanted = environment.get(variable) or name
    path = shutil.which(wanted.split()[0], path=environment.get("PATH", os.defpath))
    if path is not None:
        return ok(name, path)
    found = f"{wanted} is not on PATH" + (f" ({variable} names it)" if wanted != name else "")
    do = f"apt install {name}" if wanted == name else f"unset {variable}, or install {wanted}"
    if device == "cuda":
        return problem(name, f"{found}; Triton compiles its kernels with it", do)
    if variable == "CC":
        return skipped(name, f"{found}; only kernels of a GPU are compiled with it")
    return warning(name, f"{found}; {COMPILED_ON_CPU}", do)


def check_python_header(include: Path, device: str) -> Finding:
    """``include``: the interpreter's own folder of headers."""
    if (include / "Python.h").is_file():
        return ok("Python.h", str(include / "Python.h"))
    found, do = f"not in {include}", "apt install python3-dev (for another Python: its own package of headers)"
    if device == "cuda":
        return problem("Python.h", f"{found}; Triton compiles against it", do)
    return warning("Python.h", f"{found}; {COMPILED_ON_CPU}", do)


# ---- memory --------------------------------------------------------------------------------------------------------


def read_memory(proc: Path) -> Usage:
    """The machine's memory: in all, and available without swapping."""
    lines = (line.partition(":") for line in (proc / "meminfo").read_text().splitlines())
    values = {name: int(rest.split()[0]) << 10 for name, _, rest in lines if rest.split()}
    return Usage(values["MemTotal"], values.get("MemAvailable", values.get("MemFree", 0)))


def check_memory(total: int, available: int, needed: int | None) -> Finding:
    """``needed``: what the named model takes in it at the peak, bytes; None: nothing is known."""
    found = f"{format_bytes(available)} available of {format_bytes(total)}"
    if needed is not None:
        found += f"; the model needs about {format_bytes(needed)}"
    if available < FEW_BYTES or (needed is not None and needed > total):
        do = "end other programs" if available < FEW_BYTES and total > FEW_BYTES else "use a larger machine"
        return problem("memory", found, do + (", or a smaller model" if needed else ""))
    if available < max(LITTLE_MEMORY, needed or 0):
        return warning("memory", found, "end other programs before the run")
    return ok("memory", found)


def check_shm(folder: Path, look: Look, cfg: Config, params: int | None) -> Finding:
    """Ray's object store and the workers' kept states are there (cluster=ray); one worker needs nothing."""
    if not folder.is_dir():
        return warning(str(folder), "missing", "mount it (docker run --shm-size=8g); cluster=ray needs it")
    usage = look(folder)
    found = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    do = "mount it larger (docker run --shm-size=8g)"
    if cfg.cluster.kind != "ray":
        if usage.free < LITTLE_SHM:
            return warning(str(folder), f"{found}; too little for cluster=ray and for NCCL between GPUs", do)
        return ok(str(folder), found)
    keeps = cfg.cluster.keep_shards and cfg.cluster.shards_dir == str(folder)
    needed = cfg.cluster.object_store_bytes + (2 * CHECKPOINT_BYTES * (params or 0) if keeps else 0)
    if usage.free < needed:
        if keeps and params:
            do += ", or set cluster.keep_shards=false"
        return problem(str(folder), f"{found}; the workers need {format_bytes(needed)}", do)
    return ok(str(folder), found)


# ---- disks ---------------------------------------------------------------------------------------------------------


def check_disk(name: str, folder: Path, look: Look, needed: int, do: str) -> Finding:
    """``folder`` need not exist yet. ``needed``: bytes, 0 if nothing is known."""
    existing = nearest_folder(folder)
    usage = look(existing)
    found = f"{format_bytes(usage.free)} free in {existing}"
    if needed:
        found += f"; about {format_bytes(needed)} are needed"
    if usage.free < max(needed, FEW_BYTES):
        return problem(name, found, f"free space, or {do}")
    if usage.free < LITTLE_DISK:
        return warning(name, found, f"free space, or {do}")
    return ok(name, found)


def check_runs(cfg: Config, look: Look, params: int | None) -> Finding:
    """The folder of runs: writable, with room for the checkpoints that are kept and one that is being written."""
    try:
        check_run_directory(cfg)
    except UserError as error:
        return of_error("disk for runs", error)
    needed = CHECKPOINT_BYTES * (params or 0) * (cfg.checkpoint.keep_last + 1)
    return check_disk("disk for runs", Path(cfg.runs_dir), look, needed, "set runs_dir=FOLDER")


def check_hub_cache(environment: Mapping[str, str], look: Look, params: int | None) -> Finding:
    """``params``: of a model that is still to be downloaded; None: there is none."""
    needed = DOWNLOAD_BYTES * (params or 0)
    return check_disk("disk for models", hub_cache(environment), look, needed, "set HF_HOME=FOLDER")


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub puts what it downloads."""
    home = Path(environment.get("HOME", "~")).expanduser()
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    inside = Path(environment.get("HF_HOME") or cache / "huggingface") / "hub"
    return Path(environment.get("HF_HUB_CACHE") or inside).expanduser()


def nearest_folder(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))


# ---- sandbox -------------------------------------------------------------------------------------------------------


def check_sandbox(cfg: Config) -> Finding:
    """A sandbox is started, as a reward that runs programs starts it; only such a reward needs it, unless it is told to
    do without."""
    from rlpost.sandbox.box import Sandbox

    try:
        with Sandbox() as sandbox:
            sandbox.start()
    except ConfigError as error:
        needs = runs_programs(cfg)
        finding = of_error("sandbox", error, "problem" if needs else "warning")
        return finding if needs else warning("sandbox", f"{finding.found}; rewards for code need it", finding.do)
    return ok("sandbox", "bubblewrap isolates programs")


def runs_programs(cfg: Config) -> bool:
    try:
        functions = list_functions(cfg.reward)
    except ConfigError:  # no reward is named
        return False
    isolated = [one for one in functions if not one.args.get("allow_unsafe_execution_without_sandbox")]
    names = [one.function.get("_target_") if isinstance(one.function, Mapping) else one.function for one in isolated]
    return any(str(name) in SANDBOXED or str(name).startswith("rlpost.rewards.library.code.") for name in names)

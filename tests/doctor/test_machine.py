"""Compilers, memory, disks, containers, the CPU: planted in folders that stand for /proc, /sys/fs/cgroup and PATH."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from rlpost.config import Config
from rlpost.doctor import cpu, limits, machine
from rlpost.doctor.limits import MemoryLimit
from rlpost.doctor.machine import GIB, Usage

B4 = 4_000_000_000  # parameters


def program(folder: Path, name: str, text: str = "#!/bin/sh\n") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(text)
    file.chmod(0o755)
    return file


# ---- compilers -----------------------------------------------------------------------------------------------------


def test_a_missing_compiler_is_a_problem_on_a_gpu_and_a_warning_on_a_cpu(tmp_path: Path) -> None:
    path = program(tmp_path / "bin", "gcc")
    environment = {"PATH": str(tmp_path / "bin")}
    found = machine.check_compiler("gcc", "CC", environment, "cuda")
    assert (found.status, found.found) == ("ok", str(path))
    missing = machine.check_compiler("g++", "CXX", environment, "cuda")
    assert (missing.status, missing.do) == ("problem", "apt install g++")
    assert machine.check_compiler("g++", "CXX", environment, "cpu").status == "warning"


def test_a_cpu_needs_no_c_compiler_but_lscpu(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path / "bin")}
    assert machine.check_compiler("gcc", "CC", environment, "cpu").status == "skipped"
    missing = cpu.check_lscpu(environment)
    assert (missing.status, missing.do) == ("problem", "apt install util-linux")
    assert cpu.check_lscpu({"PATH": str(program(tmp_path / "bin", "lscpu").parent)}).status == "ok"


def test_the_compiler_that_a_variable_names_is_the_one_that_counts(tmp_path: Path) -> None:
    program(tmp_path / "bin", "gcc")
    environment = {"PATH": str(tmp_path / "bin"), "CC": "icx -O2"}
    finding = machine.check_compiler("gcc", "CC", environment, "cuda")
    assert finding.status == "problem" and "icx" in finding.found and finding.do.startswith("unset CC")
    program(tmp_path / "bin", "icx")
    assert machine.check_compiler("gcc", "CC", environment, "cuda").status == "ok"


def test_headers_of_python_are_looked_for_in_its_own_folder(tmp_path: Path) -> None:
    missing = machine.check_python_header(tmp_path, "cuda")
    assert missing.status == "problem" and "python3-dev" in missing.do and "Triton" in missing.found
    assert machine.check_python_header(tmp_path, "cpu").status == "warning"
    (tmp_path / "Python.h").write_text("")
    assert machine.check_python_header(tmp_path, "cuda").status == "ok"


# ---- memory and disks ----------------------------------------------------------------------------------------------


def test_memory_is_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       24689752 kB\nMemFree:  100 kB\nMemAvailable:   23018572 kB\n")
    assert machine.read_memory(tmp_path) == Usage(24689752 << 10, 23018572 << 10)
    (tmp_path / "meminfo").write_text("MemTotal:       1000 kB\nMemFree:  100 kB\nHugePages_Total:  0\n")
    assert machine.read_memory(tmp_path).free == 100 << 10


@pytest.mark.parametrize(
    ("total", "available", "needed", "status"),
    [
        (24, 20, None, "ok"),
        (24, 1.5, None, "warning"),
        (24, 0.5, None, "problem"),
        (24, 20, 18, "ok"),
        (24, 16, 18, "warning"),
        (24, 20, 30, "problem"),
    ],
)
def test_memory_is_compared_with_what_a_run_takes(total, available, needed, status) -> None:
    finding = machine.check_memory(
        int(total * GIB), int(available * GIB), None if needed is None else int(needed * GIB)
    )
    assert finding.status == status


def test_a_small_shared_memory_matters_to_ray(tmp_path: Path) -> None:
    local, ray = Config(), replace(Config(), cluster=replace(Config().cluster, kind="ray", shards_dir=str(tmp_path)))
    docker, full, roomy = Usage(64 << 20, 64 << 20), Usage(8 * GIB, 0), Usage(16 * GIB, 15 * GIB)
    for usage, on_one, on_ray in ((docker, "warning", "problem"), (full, "warning", "problem"), (roomy, "ok", "ok")):
        assert machine.check_shm(tmp_path, lambda folder, usage=usage: usage, local, None).status == on_one
        assert machine.check_shm(tmp_path, lambda folder, usage=usage: usage, ray, None).status == on_ray
    large = machine.check_shm(tmp_path, lambda folder: roomy, ray, B4)
    assert large.status == "problem" and "cluster.keep_shards=false" in large.do, "twice 16 bytes a parameter"
    kept_elsewhere = replace(ray, cluster=replace(ray.cluster, keep_shards=False))
    assert machine.check_shm(tmp_path, lambda folder: roomy, kept_elsewhere, B4).status == "ok"
    assert machine.check_shm(tmp_path / "none", lambda folder: roomy, local, None).status == "warning"


def test_a_full_disk_is_a_problem_and_the_nearest_folder_is_asked(tmp_path: Path) -> None:
    asked = []

    def look(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(100 * GIB, free)

    for gib, needed, status in ((50, 0, "ok"), (3, 0, "warning"), (0.5, 0, "problem"), (50, 60 * GIB, "problem")):
        free = int(gib * GIB)
        finding = machine.check_disk("disk", tmp_path / "a" / "b", look, needed, "set runs_dir=FOLDER")
        assert finding.status == status
        assert status == "ok" or finding.do == "free space, or set runs_dir=FOLDER"
    assert set(asked) == {tmp_path}


def test_checkpoints_of_the_named_model_must_fit(tmp_path: Path) -> None:
    cfg = replace(Config(), name="x", runs_dir=str(tmp_path / "runs"))
    assert machine.check_runs(cfg, lambda folder: Usage(200 * GIB, 100 * GIB), None).status == "ok"
    finding = machine.check_runs(cfg, lambda folder: Usage(200 * GIB, 100 * GIB), B4)
    assert finding.status == "problem" and "179 GiB" in finding.found, "16 bytes x 4e9 x 3 checkpoints"
    assert not (tmp_path / "runs").exists()


def test_a_folder_for_runs_that_is_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    cfg = replace(Config(), name="x", runs_dir=str(tmp_path / "runs"))
    finding = machine.check_runs(cfg, lambda folder: Usage(GIB, GIB), None)
    assert finding.status == "problem" and "set runs_dir" in finding.do


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HOME": "/h", "HF_HOME": "/big/hf"}, "/big/hf/hub"),
        ({"HOME": "/h", "HF_HOME": "/big/hf", "HF_HUB_CACHE": "/c"}, "/c"),
    ],
)
def test_the_hubs_cache_is_where_the_hubs_own_library_puts_it(environment, cache) -> None:
    assert machine.hub_cache(environment) == Path(cache)
    asked = []
    machine.check_hub_cache(environment, lambda folder: asked.append(folder) or Usage(GIB, GIB * 90), None)
    assert asked[0] in (Path(cache), *Path(cache).parents)


# ---- control groups ------------------------------------------------------------------------------------------------


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    return tmp_path / "proc"


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_the_smallest_quota_of_the_groups_above_holds(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/user.slice/job\n")
    top = tmp_path / "cgroup"
    group(top / "user.slice" / "job", cpu__max="max 100000", memory__max="max", memory__current="5")
    assert limits.find_cpu_quota(proc, top) is None and limits.find_memory_limit(proc, top) is None
    group(top / "user.slice", cpu__max="150000 100000", memory__max=str(8 * GIB), memory__current=str(GIB))
    assert limits.find_cpu_quota(proc, top) == 1.5
    assert limits.find_memory_limit(proc, top) == MemoryLimit(limit=8 * GIB, used=GIB)
    group(top / "user.slice" / "job", cpu__max="400000 100000", memory__max=str(4 * GIB), memory__current="0")
    assert limits.find_cpu_quota(proc, top) == 1.5
    assert limits.find_memory_limit(proc, top) == MemoryLimit(limit=4 * GIB, used=0)


def test_a_container_sees_its_group_as_the_top(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n")
    group(tmp_path / "cgroup", cpu__max="200000 100000")
    assert limits.find_cpu_quota(proc, tmp_path / "cgroup") == 2


def test_version_1_has_a_folder_for_each_controller(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text(
        "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
    )
    top = tmp_path / "cgroup"
    group(top / "cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    group(top / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="7")
    assert limits.find_cpu_quota(proc, top) is None and limits.find_memory_limit(proc, top) is None
    group(top / "cpu,cpuacct", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    group(top / "memory", memory__limit_in_bytes=str(2 * GIB), memory__usage_in_bytes=str(GIB))
    assert limits.find_cpu_quota(proc, top) == 0.5
    assert limits.find_memory_limit(proc, top) == MemoryLimit(limit=2 * GIB, used=GIB)


def test_a_machine_without_control_groups_has_no_limits(proc: Path, tmp_path: Path) -> None:
    assert limits.find_cpu_quota(proc, tmp_path) is None and limits.find_memory_limit(proc, tmp_path) is None


@pytest.mark.parametrize(
    ("quota", "cores", "threads", "status", "do"),
    [
        (None, 64, None, "ok", ""),
        (4.0, 64, None, "warning", "add threads=4 "),
        (0.5, 2, None, "warning", "add threads=1 "),
        (4.0, 64, 4, "ok", ""),
        (4.0, 64, 8, "warning", "add threads=4 "),
        (8.0, 8, None, "ok", ""),
    ],
)
def test_a_quota_below_the_cores_asks_for_fewer_threads(quota, cores, threads, status, do) -> None:
    finding = limits.check_cpu_quota(quota, cores, threads)
    assert finding.status == status and finding.do.startswith(do)


def test_a_memory_limit_matters_where_the_kv_cache_is_sized_from_free_memory() -> None:
    limit = MemoryLimit(limit=8 * GIB, used=4 * GIB)
    finding = limits.check_memory_limit(limit, 200 * GIB, "cpu", None)
    assert finding.status == "warning" and f"engine.kv_cache_bytes={GIB} " in finding.do
    assert limits.check_memory_limit(limit, 200 * GIB, "cpu", GIB).status == "ok"
    assert limits.check_memory_limit(limit, 200 * GIB, "cuda", None).status == "ok"
    assert limits.check_memory_limit(limit, 3 * GIB, "cpu", None).status == "ok"
    assert limits.check_memory_limit(None, 3 * GIB, "cpu", None).status == "ok"


# ---- the CPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        ("fpu sse4_2 avx", "problem", "no AVX2"),
        ("avx avx2 fma", "ok", "AVX2, no AVX-512"),
        ("avx avx2 avx512f avx512bw", "ok", "AVX-512"),
        ("avx avx2 avx512f avx512_bf16", "ok", "AVX-512 with bfloat16"),
    ],
)
def test_instructions_are_those_of_the_first_core(tmp_path: Path, flags, status, said) -> None:
    core = f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\n"
    (tmp_path / "cpuinfo").write_text(core * 3)
    finding = cpu.check_instructions(cpu.read_flags(tmp_path))
    assert finding.status == status and said in finding.found


@pytest.mark.parametrize(
    ("load", "cores", "threads", "status"),
    [(0.3, 2, None, "ok"), (3.9, 8, None, "ok"), (4.5, 8, None, "warning"), (9.0, 8, 1, "ok"), (3.0, 1, None, "ok")],
)
def test_a_busy_machine_asks_for_one_thread(tmp_path: Path, load, cores, threads, status) -> None:
    (tmp_path / "loadavg").write_text(f"{load} 5.58 3.62 7/164 22883\n")
    finding = cpu.check_load(cpu.read_load(tmp_path), cores, threads)
    assert finding.status == status and (status == "ok" or "threads=1" in finding.do)


def test_bfloat16_on_a_cpu_is_a_warning() -> None:
    assert cpu.check_dtype("float32").status == "ok"
    assert "model.dtype=float32" in cpu.check_dtype("bfloat16").do


# ---- the sandbox ---------------------------------------------------------------------------------------------------


def coded(function: object) -> Config:
    return replace(Config(), reward=replace(Config().reward, function=function))


def test_only_rewards_that_run_programs_need_a_sandbox() -> None:
    assert machine.runs_programs(coded("code_functions"))
    assert machine.runs_programs(coded({"_target_": "rlpost.rewards.library.code.CodeStdio", "cpu_s": 1}))
    assert not machine.runs_programs(coded("math"))
    unsafe = replace(coded("code_stdio").reward, args={"allow_unsafe_execution_without_sandbox": True})
    assert not machine.runs_programs(replace(Config(), reward=unsafe))
    assert not machine.runs_programs(replace(Config(), reward=replace(Config().reward, function=None)))


def test_no_bubblewrap_is_a_warning_and_for_rewards_of_code_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = machine.check_sandbox(Config())
    assert finding.status == "warning" and "bwrap" in finding.found and "apt install bubblewrap" in finding.do
    assert machine.check_sandbox(coded("code_stdio")).status == "problem"


def test_a_bubblewrap_that_is_refused_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "bwrap: No permissions to create new namespace"
    program(tmp_path / "bin", "bwrap", f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    finding = machine.check_sandbox(coded("code_functions"))
    assert finding.status == "problem" and said in finding.found and "user namespaces" in finding.do

"""GPUs: what nvidia-smi prints, planted as a program on PATH, and what the probes report."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rlpost.doctor import gpu, gpu_results
from rlpost.doctor.gpu import Card
from rlpost.doctor.gpu_probes import compiler, read_headers, read_nvcc
from rlpost.doctor.programs import Ended, Probed
from rlpost.errors import explain

GIB = 1 << 30
TWO_CARDS = """\
0, GPU-5f3b8a1c-0000-1111-2222-333344445555, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 81004, 9.0
1, GPU-99aa8a1c-0000-1111-2222-333344445555, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 1200, 9.0
"""
MIG = "0, GPU-77, NVIDIA A100-SXM4-80GB MIG 1g.10gb, 570.86.15, [N/A], [N/A], 8.0\n"
OLD = "0, GPU-0a, Tesla V100-SXM2-32GB, 535.183.01, 32768, 32500, 7.0\n"
NO_DEVICES = "No devices were found\n"
APPS = """\
4711, /usr/bin/python3, 40960
4712, /opt/My Program, with a comma, 512
4713, [Not Found], [N/A]
"""


def plant_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, cards: str, apps: str = "", status: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "cards").write_text(cards)
    (folder / "apps").write_text(apps)
    script = folder / "nvidia-smi"
    choice = f'case "$1" in\n  --query-gpu=*) cat {folder}/cards ;;\n  *) cat {folder}/apps ;;\nesac'
    script.write_text(f"#!/bin/sh\n{choice}\nexit {status}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def card(**changes: object) -> Card:
    (first, _) = gpu.read_cards(TWO_CARDS)
    return replace(first, **changes)  # type: ignore[arg-type]


# ---- nvidia-smi ----------------------------------------------------------------------------------------------------


def test_cards_and_occupants_are_read_from_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_smi(tmp_path / "bin", monkeypatch, TWO_CARDS, APPS)
    ended = gpu.ask_cards()
    cards = gpu.read_cards(ended.out)
    assert [(c.index, c.driver, c.capability, c.total) for c in cards] == [
        (0, "580.95.05", (9, 0), 81559 << 20),
        (1, "580.95.05", (9, 0), 81559 << 20),
    ]
    assert cards[0].name == "NVIDIA H100 80GB HBM3" and cards[1].free == 1200 << 20
    assert gpu.check_smi(ended, cards, works=False).status == "ok"
    occupants = gpu.read_occupants(gpu.ask_occupants().out)
    assert [(o.pid, o.name, o.used) for o in occupants] == [
        (4711, "/usr/bin/python3", 40960 << 20),
        (4712, "/opt/My Program, with a comma", 512 << 20),
        (4713, "[Not Found]", None),
    ]


def test_what_the_driver_does_not_say_is_unknown() -> None:
    (slice_of_one,) = gpu.read_cards(MIG)
    assert (slice_of_one.total, slice_of_one.free, slice_of_one.capability) == (None, None, (8, 0))
    assert gpu.check_free(slice_of_one, 10**9, "").status == "skipped"
    (unknown,) = gpu.read_cards(MIG.replace("8.0", "[N/A]"))
    assert gpu.check_capability(unknown).status == "skipped"


def test_no_nvidia_smi_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = gpu.ask_cards()
    finding = gpu.check_smi(ended, gpu.read_cards(ended.out), works=False)
    assert finding.status == "problem" and "nvidia-smi: No such file" in finding.found and "--gpus all" in finding.do
    assert gpu.check_smi(ended, [], works=True).status == "warning", "torch uses a GPU all the same"


@pytest.mark.parametrize(
    ("said", "status", "quoted"),
    [
        (NO_DEVICES, 0, "No devices were found"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", 9, "couldn't communicate"),
        ("", 0, "no GPU"),
    ],
)
def test_an_nvidia_smi_that_finds_nothing_is_a_problem(tmp_path, monkeypatch, said, status, quoted) -> None:
    plant_smi(tmp_path / "bin", monkeypatch, said, status=status)
    ended = gpu.ask_cards()
    finding = gpu.check_smi(ended, gpu.read_cards(ended.out), works=False)
    assert finding.status == "problem" and quoted in finding.found


def test_an_old_driver_that_does_not_know_every_column_is_asked_again(tmp_path, monkeypatch) -> None:
    plant_smi(tmp_path / "bin", monkeypatch, OLD.replace(", 7.0", ""))
    script = tmp_path / "bin" / "nvidia-smi"
    refusal = 'case "$1" in *compute_cap*) echo \'Field "compute_cap" is not a valid field to query.\'; exit 2 ;; esac'
    script.write_text(script.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{refusal}\n"))
    (old,) = gpu.read_cards(gpu.ask_cards().out)
    assert (old.driver, old.capability, old.total) == ("535.183.01", None, 32768 << 20)


@pytest.mark.parametrize(
    ("visible", "indexes"),
    [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("", []), ("-1", []), ("0,7,1", [0]), ("GPU-99aa", [1])],
)
def test_only_visible_cards_count(visible, indexes) -> None:
    assert [c.index for c in gpu.visible_cards(gpu.read_cards(TWO_CARDS), visible)] == indexes


@pytest.mark.parametrize(
    ("driver", "cuda", "status"),
    [
        ("580.95.05", "13.0", "ok"),
        ("575.57.08", "13.0", "problem"),
        ("535.183.01", "12.8", "ok"),
        ("470.82.01", "12.8", "problem"),
        ("590.1", "14.0", "skipped"),
        ("580.95.05", None, "skipped"),
    ],
)
def test_the_driver_is_compared_with_torchs_cuda(driver, cuda, status) -> None:
    finding = gpu.check_driver(driver, cuda)
    assert finding.status == status and driver in finding.found


def test_the_number_of_gpus_is_compared_with_the_workers() -> None:
    assert gpu.check_count(2, 2, None).status == "ok"
    finding = gpu.check_count(1, 4, None)
    assert finding.status == "problem" and "cluster.num_workers=1" in finding.do
    assert gpu.check_count(1, 4, "head:6379").status == "ok"
    assert gpu.check_count(0, 1, None).do == "use device=cpu"
    assert gpu.check_count(None, 1, None).status == "skipped"


def test_capability_8_0_is_the_least() -> None:
    (old,) = gpu.read_cards(OLD)
    finding = gpu.check_capability(old)
    assert finding.status == "problem" and "7.0, below 8.0" in finding.found
    assert gpu.check_capability(card()).status == "ok"
    assert gpu.check_capability(card(capability=(8, 0))).status == "ok"


def test_other_processes_are_named_and_hidden_ones_suspected() -> None:
    free, taken = gpu.read_cards(TWO_CARDS)
    finding = gpu.check_occupants([free, taken], Ended(out=APPS, failure=""))
    assert finding.status == "warning" and "/usr/bin/python3 (4711) 40 GiB" in finding.found
    assert "[Not Found] (4713) ?" in finding.found
    assert gpu.check_occupants([free], Ended(out="", failure="")).status == "ok"
    finding = gpu.check_occupants([free, taken], Ended(out="", failure=""))
    assert finding.status == "warning" and "GPU 1: 78.5 GiB in use, by no process in sight" in finding.found
    assert gpu.check_occupants([free], Ended(out="", failure="exit status 9")).status == "skipped"


def test_free_memory_is_compared_with_24_bytes_a_parameter() -> None:
    assert gpu.check_free(card(), None, "").status == "ok"
    assert gpu.check_free(card(), 3_000_000_000, "").status == "ok", "67 of 79 GiB"
    finding = gpu.check_free(card(), 4_000_000_000, "")
    assert finding.status == "problem" and "89.4 GiB" in finding.found and "zero3_offload" in finding.do
    assert gpu.check_free(card(), 4_000_000_000, "states are offloaded").status == "ok"


def test_pinned_memory_takes_powers_of_two() -> None:
    assert gpu.pinned_bytes(1 << 30) == 16 * GIB
    assert gpu.pinned_bytes((1 << 30) + 1) == 32 * GIB
    assert gpu.check_pinned(40 * GIB, 1 << 30, True).status == "ok"
    finding = gpu.check_pinned(20 * GIB, (1 << 30) + 1, True)
    assert finding.status == "problem" and "32 GiB" in finding.found and "sleep_offload=false" in finding.do
    assert gpu.check_pinned(1, 1 << 30, False).status == "skipped"
    assert gpu.check_pinned(1, None, True).status == "skipped"


# ---- probes --------------------------------------------------------------------------------------------------------

GOOD = {
    "torch": {"count": 2, "capabilities": [[9, 0], [8, 6]], "architectures": ["sm_80", "sm_90a", "sm_90", "sm_120"]},
    "copies": {"to_device": 52.1, "to_host": 49.8, "pinning_s": 0.2},
    "peers": {"count": 2, "apart": []},
    "triton": {"version": "3.5.0"},
    "collective": {"backend": "nccl", "version": "2.28.3"},
    "extensions": {"loaded": ["_C_stable_libtorch", "cumem_allocator"]},
    "sleeping": {"freed": 64 << 20, "bytes": 64 << 20, "same": True, "seconds": 0.03},
    "compiler": {"nvcc": ""},
}


def nvcc(version: str, headers: str) -> dict[str, str]:
    return {"nvcc": version, "headers": headers, "path": "/x/nvcc", "torch": "13.0"}


def findings(results=None, failures=None, *, tensor_parallel: int = 1, zero_stage: int = 1, drop: str = ""):
    kept = {name: result for name, result in {**GOOD, **(results or {})}.items() if name not in (failures or {})}
    kept.pop(drop, None)
    found = gpu_results.check_probes(
        Probed(results=kept, failures=failures or {}), tensor_parallel=tensor_parallel, zero_stage=zero_stage
    )
    assert len(found) == len(GOOD)
    return {finding.name: finding for finding in found}


def test_a_gpu_on_which_everything_works_is_fine() -> None:
    found = findings()
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["NCCL"].found == "nccl 2.28.3" and "52.1 GB/s" in found["copies"].found


@pytest.mark.parametrize(
    ("name", "results", "status", "said"),
    [
        ("torch and the GPU", {"torch": {**GOOD["torch"], "capabilities": [[7, 0]]}}, "problem", "capability 7.0"),
        ("torch and the GPU", {"torch": {**GOOD["torch"], "capabilities": [[12, 1]]}}, "ok", "2 GPUs"),
        ("copies", {"copies": {"to_device": 3.1, "to_host": 12.0}}, "warning", "3.1 GB/s to the GPU"),
        ("copies", {"copies": {"to_device": 25.0, "to_host": 1.0}}, "warning", "1.0 GB/s back"),
        ("GPU to GPU", {"peers": {"count": 1, "apart": []}}, "skipped", "one GPU"),
        ("GPU to GPU", {"peers": {"count": 2, "apart": [[0, 1], [1, 0]]}}, "ok", "0-1, 1-0"),
        ("sleep and wake", {"sleeping": {**GOOD["sleeping"], "same": False}}, "problem", "another address"),
        ("sleep and wake", {"sleeping": {**GOOD["sleeping"], "freed": 0}}, "problem", "not released"),
        ("nvcc", {"compiler": nvcc("13.5", "13.0")}, "warning", "13.5 at /x/nvcc"),
        ("nvcc", {"compiler": nvcc("13.0", "13.0")}, "ok", "headers of 13.0"),
        ("nvcc", {"compiler": nvcc("12.8", "12.8")}, "warning", "torch for CUDA 13.0"),
        ("nvcc", {"compiler": nvcc("13.0", "")}, "warning", "no CUDA"),
    ],
)
def test_what_a_probe_reports_becomes_a_finding(name, results, status, said) -> None:
    finding = findings(results)[name]
    assert finding.status == status and said in finding.found


def test_gpus_that_do_not_see_each_other_matter_to_tensor_parallel() -> None:
    apart = {"peers": {"count": 2, "apart": [[0, 1]]}}
    assert findings(apart, tensor_parallel=2)["GPU to GPU"].status == "warning"


def test_a_gpu_that_torch_cannot_use_is_one_problem_and_the_rest_is_skipped() -> None:
    reason = explain("device", "cuda, but for torch: driver too old (12080)", "a GPU that torch can use", "look at it")
    found = findings({"compiler": GOOD["compiler"]}, {"torch": reason, "triton": "x", "sleeping": "y"})
    assert found["torch and the GPU"].status == "problem" and found["torch and the GPU"].do == "look at it"
    assert "too old (12080)" in found["torch and the GPU"].found
    assert [f.name for f in found.values() if f.status == "problem"] == ["torch and the GPU"]
    assert found["Triton"].status == found["NCCL"].status == "skipped"


@pytest.mark.parametrize(
    ("key", "name", "do"),
    [
        ("triton", "Triton", "python3-dev"),
        ("collective", "NCCL", "NCCL_DEBUG=INFO"),
        ("extensions", "vLLM's kernels", "make install DEVICE=gpu"),
        ("sleeping", "sleep and wake", "rollout.keep_kv=true"),
        ("copies", "copies", "dmesg"),
        ("peers", "GPU to GPU", "make install"),
    ],
)
def test_a_probe_that_fails_or_is_not_reached_is_a_problem(key, name, do) -> None:
    finding = findings({}, {key: "RuntimeError: nothing works"})[name]
    assert finding.status == "problem" and finding.found == "RuntimeError: nothing works" and do in finding.do
    assert "not reached" in findings(drop=key)[name].found
    assert findings(drop="compiler")["nvcc"].status == "warning"


# ---- nvcc and headers ----------------------------------------------------------------------------------------------


def test_versions_of_nvcc_and_of_headers_are_read() -> None:
    said = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.5, V13.5.12\nBuild cuda_13.5\n"
    assert read_nvcc(said) == "13.5" and read_nvcc("nothing") == ""
    assert read_headers('# 1 "version.cu"\n13000\n') == "13.0" and read_headers("x\n12080") == "12.8"
    assert read_headers("CUDART_VERSION\n") == read_headers("") == ""


def test_the_nvcc_that_is_found_is_asked_for_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler("cpu") == {"nvcc": ""}
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "nvcc"
    answers = 'case "$1" in --version) echo "tools, release 13.5, V13.5.12" ;; -E) echo 13000 ;; esac'
    script.write_text(f"#!/bin/sh\n{answers}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = compiler("cpu")
    assert (found["nvcc"], found["headers"], found["path"]) == ("13.5", "13.0", str(script))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    assert compiler("cpu")["path"] == str(script), "that of CUDA_HOME"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_a_real_nvcc_says_its_versions() -> None:
    found = compiler("cpu")
    assert found["nvcc"].partition(".")[0] == found["headers"].partition(".")[0] != ""

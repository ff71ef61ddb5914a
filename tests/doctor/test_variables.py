"""Every variable that a rule knows: the value that breaks, the value that does not, and what to type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlpost.doctor.variables import RULES, Setting, check_variables

CPU = Setting(device="cpu", cores=8, torch_is_for_cpus=True)
GPU = Setting(device="cuda", cores=8, torch_is_for_cpus=False)
CPU_TORCH = replace(GPU, torch_is_for_cpus=True)

BREAKS = [
    ("VLLM_CPU_KVCACHE_SPACE", "4", CPU, "warning", "engine.kv_cache_bytes"),
    ("VLLM_USE_V2_MODEL_RUNNER", "0", GPU, "warning", "unset"),
    ("DS_ACCELERATOR", "cpu", GPU, "problem", "unset"),
    ("PIP_INDEX_URL", "https://mirror/simple", CPU_TORCH, "warning", "make install DEVICE=gpu"),
    ("PIP_EXTRA_INDEX_URL", "https://download/whl/cpu", CPU_TORCH, "warning", "unset PIP_EXTRA_INDEX_URL"),
    ("PIP_FIND_LINKS", "/wheels", CPU_TORCH, "warning", "unset PIP_FIND_LINKS"),
    ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, Expandable_Segments: True", GPU, "warning", "expandable_seg"),
    ("PYTORCH_ALLOC_CONF", "garbage_collection_threshold:0.8", GPU, "warning", "unless"),
    ("OMP_NUM_THREADS", "9", CPU, "warning", "threads=N"),
    ("OMP_NUM_THREADS", "all", CPU, "warning", "threads=N"),
    ("OMP_NUM_THREADS", "0", GPU, "warning", "threads=N"),
    ("CUDA_VISIBLE_DEVICES", "", GPU, "problem", "device=cpu"),
    ("CUDA_VISIBLE_DEVICES", "-1,0", GPU, "problem", "device=cpu"),
    ("NVIDIA_VISIBLE_DEVICES", "void", GPU, "problem", "--gpus all"),
    ("TRITON_INTERPRET", "1", GPU, "problem", "unset"),
    ("CUDA_LAUNCH_BLOCKING", "1", GPU, "warning", "unset"),
]
HARMLESS = [
    ("DS_ACCELERATOR", "cuda", GPU),
    ("DS_ACCELERATOR", "cpu", CPU),
    ("PIP_INDEX_URL", "https://mirror/simple", GPU),
    ("PIP_EXTRA_INDEX_URL", "https://download/whl/cpu", CPU),
    ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", CPU),
    ("OMP_NUM_THREADS", "8", CPU),
    ("CUDA_VISIBLE_DEVICES", "", CPU),
    ("CUDA_VISIBLE_DEVICES", "1,2", GPU),
    ("NVIDIA_VISIBLE_DEVICES", "all", GPU),
    ("TRITON_INTERPRET", "0", GPU),
    ("TRITON_INTERPRET", "1", CPU),
    ("CUDA_LAUNCH_BLOCKING", "0", GPU),
    ("LD_LIBRARY_PATH", "", GPU),
    ("HOME", "/root", GPU),
]


@pytest.mark.parametrize(("name", "value", "setting", "status", "do"), BREAKS)
def test_a_value_that_breaks_says_what_it_breaks_and_what_to_type(name, value, setting, status, do) -> None:
    (finding,) = check_variables({name: value}, setting)
    assert (finding.name, finding.status) == (name, status)
    assert finding.found.startswith(f"set to {value!r}: ") and do in finding.do and "{" not in finding.do


@pytest.mark.parametrize(("name", "value", "setting"), HARMLESS)
def test_a_harmless_value_says_nothing(name, value, setting) -> None:
    (finding,) = check_variables({name: value}, setting)
    assert (finding.name, finding.status) == ("variables", "ok")


def test_libraries_that_hide_torchs_own_are_named(tmp_path: Path) -> None:
    clean, cuda = tmp_path / "clean", tmp_path / "cuda" / "lib64"
    clean.mkdir()
    cuda.mkdir(parents=True)
    (clean / "libmine.so").write_text("")
    value = f"{clean}:{cuda}:/nowhere:"
    assert check_variables({"LD_LIBRARY_PATH": value}, GPU)[0].status == "ok"
    (cuda / "libcudart.so.12").write_text("")
    (cuda / "libnccl.so.2").write_text("")
    (finding,) = check_variables({"LD_LIBRARY_PATH": value}, GPU)
    assert finding.status == "warning" and "libcudart.so.12, libnccl.so.2 there hide" in finding.found


def test_every_rule_is_planted_here_and_several_are_all_reported() -> None:
    assert set(RULES) == {row[0] for row in BREAKS} | {"LD_LIBRARY_PATH"}
    environment = {"DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1", "VLLM_CPU_KVCACHE_SPACE": "4"}
    assert len(check_variables(environment, GPU)) == 3

"""Environment variables that break or bend a run: one rule each, and what each breaks.

A rule gets the value and a :class:`Setting` and returns (status, what it does, what to do), or None where the value is
harmless. Variables that are not set are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rlpost.doctor.findings import Finding, ok, problem, warning

# Libraries that torch and vLLM bring along; others of the same name in LD_LIBRARY_PATH are loaded in their place.
OWN_LIBRARIES = ("cudart", "cublas", "cudnn", "nccl", "nvrtc", "cusparse", "cusolver", "torch", "c10", "stdc++", "gomp")
PIP_PLACES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What the rules depend on. ``torch_is_for_cpus``: of the torch that is installed."""

    device: str
    cores: int
    torch_is_for_cpus: bool


Said = tuple[str, str, str] | None
Rule = Callable[[str, Setting], Said]


def check_variables(environment: Mapping[str, str], setting: Setting) -> list[Finding]:
    findings = []
    for name, rule in RULES.items():
        if name in environment and (said := rule(environment[name], setting)) is not None:
            status, breaks, do = said
            found = f"set to {environment[name]!r}: {breaks}"
            findings.append((problem if status == "problem" else warning)(name, found, do.format(name=name)))
    return findings or [ok("variables", "none that breaks a run")]


# ---- rules ---------------------------------------------------------------------------------------------------------


def _kv_space(value: str, setting: Setting) -> Said:
    return "warning", "a run ignores it and sizes the KV cache itself", "unset {name}; set engine.kv_cache_bytes=BYTES"


def _model_runner(value: str, setting: Setting) -> Said:
    return "warning", "vLLM takes another model runner than the one that rlpost was written for", "unset {name}"


def _accelerator(value: str, setting: Setting) -> Said:
    if setting.device == "cuda" and value != "cuda":
        return "problem", "DeepSpeed does not use the GPU", "unset {name}"
    return None


def _pip_place(value: str, setting: Setting) -> Said:
    if setting.device == "cuda" and setting.torch_is_for_cpus:
        do = "unset {name}, make clean, make install DEVICE=gpu"
        return "warning", "pip may have taken torch for CPUs from there", do
    return None


def _allocator(value: str, setting: Setting) -> Said:
    if setting.device != "cuda":
        return None
    if "expandable_segments:true" in value.lower().replace(" ", ""):
        does = "vLLM's memory that sleeps needs segments that stay as they are"
        return "warning", does, "unset {name}, or remove expandable_segments:True from it"
    return "warning", "changes how trainer and engine share the GPU's memory", "unset {name} unless you need it"


def _libraries(value: str, setting: Setting) -> Said:
    hidden = [
        file.name
        for folder in value.split(":")
        if folder and Path(folder).is_dir()
        for library in OWN_LIBRARIES
        for file in sorted(Path(folder).glob(f"lib{library}.so*"))[:1]
    ]
    if not hidden:
        return None
    does = f"{', '.join(hidden[:3])} there hide those that torch brings along"
    return "warning", does, "unset {name}, or leave that folder out"


def _threads(value: str, setting: Setting) -> Said:
    if value.isdigit() and 0 < int(value) <= setting.cores:
        return None
    does = (
        f"not a number of threads from 1 to {setting.cores}, the cores here; a run takes the key threads in its place"
    )
    return "warning", does, "unset {name}; add threads=N to the command"


def _visible(value: str, setting: Setting) -> Said:
    if setting.device == "cuda" and value.split(",")[0].strip() in ("", "-1"):
        return "problem", "hides all GPUs", "unset {name}, or use device=cpu"
    return None


def _container_gpus(value: str, setting: Setting) -> Said:
    if setting.device == "cuda" and value in ("", "void", "none"):
        return "problem", "the container was given no GPU", "start it with --gpus all"
    return None


def _interpreter(value: str, setting: Setting) -> Said:
    if setting.device == "cuda" and value not in ("", "0"):
        return "problem", "Triton kernels are interpreted in Python", "unset {name}"
    return None


def _blocking(value: str, setting: Setting) -> Said:
    if setting.device == "cuda" and value not in ("", "0"):
        return "warning", "every kernel is waited for, which is slow", "unset {name} unless you look for an error"
    return None


RULES: dict[str, Rule] = {
    "VLLM_CPU_KVCACHE_SPACE": _kv_space,
    "VLLM_USE_V2_MODEL_RUNNER": _model_runner,
    "DS_ACCELERATOR": _accelerator,
    **dict.fromkeys(PIP_PLACES, _pip_place),
    "PYTORCH_CUDA_ALLOC_CONF": _allocator,
    "PYTORCH_ALLOC_CONF": _allocator,
    "LD_LIBRARY_PATH": _libraries,
    "OMP_NUM_THREADS": _threads,
    "CUDA_VISIBLE_DEVICES": _visible,
    "NVIDIA_VISIBLE_DEVICES": _container_gpus,
    "TRITON_INTERPRET": _interpreter,
    "CUDA_LAUNCH_BLOCKING": _blocking,
}

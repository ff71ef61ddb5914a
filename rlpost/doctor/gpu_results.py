"""Findings from what the probes of a GPU reported. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlpost.doctor.findings import Finding, of_failure, ok, problem, skipped, warning
from rlpost.doctor.programs import Probed

SLOW_COPY = 10.0  # GB/s; PCIe 4 with 16 lanes has nominally 31
Result = dict[str, Any]
INSTALL = "make clean, make install DEVICE=gpu"


def check_probes(probed: Probed, *, tensor_parallel: int, zero_stage: int | None) -> list[Finding]:
    """One finding for each probe. A GPU that torch cannot use is one problem: what follows from it is skipped."""
    checks: dict[str, tuple[str, Callable[[Result], Finding], str]] = {
        "torch": ("torch and the GPU", _torch, f"compare nvidia-smi with docs/gpu.md; {INSTALL}; or use device=cpu"),
        "copies": ("copies", _copies, "look at dmesg for errors of the GPU, and at the memory limit of the container"),
        "peers": ("GPU to GPU", lambda result: _peers(result, tensor_parallel), INSTALL),
        "triton": ("Triton", _triton, "apt install gcc python3-dev, then rm -rf ~/.triton/cache"),
        "collective": ("NCCL", _collective, "run it again with NCCL_DEBUG=INFO; in a container, with --shm-size=8g"),
        "extensions": ("vLLM's kernels", _extensions, INSTALL),
        "sleeping": ("sleep and wake", _sleeping, "set rollout.keep_kv=true, if the engine fits beside the trainer"),
        "compiler": ("nvcc", lambda result: _compiler(result, zero_stage), "take CUDA's bin folder out of PATH"),
    }
    unusable = "torch" in probed.failures
    findings = []
    for key, (name, check, do) in checks.items():
        if unusable and key not in ("torch", "compiler"):
            findings.append(skipped(name, "torch cannot use the GPU"))
        elif key in probed.results:
            findings.append(check(probed.results[key]))
        else:
            found = probed.failures.get(key) or "not reached: the probe ended before it"
            findings.append(of_failure(name, found, do, "warning" if key == "compiler" else "problem"))
    return findings


def _torch(result: Result) -> Finding:
    """Kernels for each GPU's architecture: of its own major version, compiled for it or an earlier minor one."""
    name, built = "torch and the GPU", {text.partition("_")[2] for text in result["architectures"]}
    for major, minor in result["capabilities"]:
        if built and not any(f"{major}{lower}" in built for lower in range(minor + 1)):
            found = f"torch has no kernels for capability {major}.{minor} (it has {', '.join(sorted(built))})"
            return problem(name, found, "use a GPU that this torch supports")
    return ok(name, f"torch uses {result['count']} GPU{'s' * (result['count'] != 1)}")


def _copies(result: Result) -> Finding:
    found = f"{result['to_device']:.1f} GB/s to the GPU, {result['to_host']:.1f} GB/s back"
    if min(result["to_device"], result["to_host"]) < SLOW_COPY:
        do = "set train.sleep_offload=false if all fits on the GPU; look at the PCIe width with nvidia-smi -q"
        return warning("copies", f"{found}: moving the trainer's states between steps is slow", do)
    return ok("copies", found)


def _peers(result: Result, tensor_parallel: int) -> Finding:
    name = "GPU to GPU"
    if result["count"] < 2:
        return skipped(name, "one GPU")
    if result["apart"]:
        pairs = ", ".join(f"{a}-{b}" for a, b in result["apart"][:3])
        found = f"no direct access between {pairs}: data goes through host memory"
        if tensor_parallel > 1:
            return warning(name, found, "set engine.tensor_parallel=1 if the model fits on one GPU")
        return ok(name, found)
    return ok(name, f"direct access between all {result['count']}")


def _triton(result: Result) -> Finding:
    return ok("Triton", f"{result['version']} compiled a kernel and ran it")


def _collective(result: Result) -> Finding:
    return ok("NCCL", f"{result['backend']} {result['version']}".strip())


def _extensions(result: Result) -> Finding:
    return ok("vLLM's kernels", f"imported: {', '.join(result['loaded'])}")


def _sleeping(result: Result) -> Finding:
    name, size = "sleep and wake", f"{result['bytes'] >> 20} MiB"
    do = "set rollout.keep_kv=true, which keeps the engine awake, and report it"
    if not result["same"]:
        return problem(name, f"{size} came back at another address or with other contents", do)
    if result["freed"] < result["bytes"] // 2:
        return problem(name, f"{size} asleep were not released", do)
    return ok(name, f"{size} released and back at the same address in {result['seconds']:.2f} s")


def _compiler(result: Result, zero_stage: int | None) -> Finding:
    """Only ZeRO-3's FusedAdam is compiled with it, and without it another AdamW is taken."""
    if not result["nvcc"]:
        return ok("nvcc", "none; train=zero3 then takes torch's AdamW")
    found = f"{result['nvcc']} at {result['path']}, headers of {result['headers'] or 'no CUDA'}"
    major = result["torch"].partition(".")[0]
    if result["nvcc"] != result["headers"] or result["nvcc"].partition(".")[0] != major:
        found += f", torch for CUDA {result['torch']}" if result["torch"] else ", torch for CPUs"
        if zero_stage != 3:
            found += "; train=zero3 could not compile its optimizer and would take torch's AdamW"
        return warning("nvcc", found, "take it out of PATH, or install headers and nvcc of the same version")
    return ok("nvcc", found)

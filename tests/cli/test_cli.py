"""The command as a user meets it: real processes for what is imported, in-process calls for the rest."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rlpost import __version__
from rlpost.cli import commands as cli
from rlpost.config.compose import list_recipes
from rlpost.errors import RunError

HEAVY = ("torch", "transformers", "vllm", "deepspeed", "datasets", "ray", "wandb")
DATA = Path(__file__).parents[1] / "fixtures" / "gsm8k_tiny.jsonl"
ROOT = Path(__file__).parents[2]


def run(capsys, *argv):
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def imported_by(*argv, cwd=ROOT):
    """(heavy modules that a real process imported for this command, its exit code, seconds)."""
    code = (
        "import sys, json\nfrom rlpost.cli import main\ncode = main(sys.argv[1:])\n"
        f"print(json.dumps([code, [m for m in {HEAVY + ('hydra', 'numpy')} if m in sys.modules]]), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("HF_HUB_OFFLINE", None)  # the test runner's; with it a model on the hub is refused
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=cwd, env=environment, timeout=600
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    exit_code, modules = json.loads(done.stderr.splitlines()[-1])
    return modules, exit_code, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_imports_nothing_and_answers_at_once():
    modules, code, seconds = imported_by("--help")
    assert (modules, code) == ([], 0)
    assert seconds < 2  # of CPU time, so that other programs do not count; 0.1 s here


@pytest.mark.parametrize(
    "argv",
    [
        ["check", "recipe=math/arithmetic"],
        ["check", "recipe=math/gsm8k", f"data.train.path={DATA}", f"data.eval.path={DATA}"],
        ["check", "recipe=math/dapo_17k_qwen3_4b"],
    ],
)
def test_check_imports_no_heavy_library(argv, tmp_path):
    modules, code, seconds = imported_by(*argv, f"runs_dir={tmp_path}")
    assert code == 0 and set(modules).isdisjoint(HEAVY)
    assert seconds < 10  # of CPU time, so that other programs do not count; 1.5 s here


def test_a_bad_run_fails_before_anything_heavy_is_imported(tmp_path):
    modules, code, _ = imported_by("train", "recipe=math/arithmetic", "rollout.oversample=0.5", f"runs_dir={tmp_path}")
    assert code == 2 and set(modules).isdisjoint(HEAVY)
    assert list(tmp_path.iterdir()) == []


def test_a_function_beside_the_caller_is_found(tmp_path):
    (tmp_path / "beside_rewards.py").write_text("def score(response, **_):\n    return 1.0\n")
    argv = ("check", "recipe=math/arithmetic", "reward.function=beside_rewards.score", "reward.args={}")
    assert imported_by(*argv, cwd=tmp_path)[1] == 0


@pytest.mark.parametrize("module", [False, True])
def test_files_beside_the_caller_hide_no_library(tmp_path, module):
    for name in ("datasets.py", "numbers.py", "select.py", "torch.py", "jinja2.py", "code/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            "raise RuntimeError('this is not the library')\n\ndef score(response):\n    return 1.0\n"
        )
    script = tmp_path / "bin" / "rlpost"
    script.parent.mkdir()
    script.write_text("import sys\nfrom rlpost.cli import main\nsys.exit(main())\n")
    start = ["-m", "rlpost"] if module else [str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def check(*overrides):
        command = [sys.executable, *start, "check", "recipe=math/arithmetic", f"runs_dir={tmp_path}", *overrides]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)

    done = check("reward.workers=1", "reward.function=math", "reward.args={}")
    assert done.returncode == 0, done.stderr
    for library in ("numbers", "select", "code"):  # named as the reward, it is the library's: say so
        done = check(f"reward.function={library}.score", "reward.workers=0", "reward.args={}")
        assert done.returncode == 2 and f"rename {library}" in done.stderr, done.stderr


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "rlpost", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"rlpost {__version__}\n")


@pytest.mark.parametrize("command", ["train", "sft", "eval", "check", "config", "recipes"])
def test_every_command_explains_itself(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    if command != "recipes":
        assert f"rlpost {command} recipe=" in out and "overrides" in out
    assert command in run(capsys, "--help")[1]


def test_recipes_are_listed_with_one_line_each(capsys):
    code, out, _ = run(capsys, "recipes")
    lines = out.splitlines()
    assert code == 0 and len(lines) == len(list_recipes())
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


def test_config_prints_what_it_takes_back(capsys, tmp_path):
    code, out, _ = run(capsys, "config", "recipe=math/arithmetic", "algo=gspo", "steps=3")
    assert code == 0
    (tmp_path / "saved.yaml").write_text(out)
    assert run(capsys, "config", f"recipe={tmp_path / 'saved.yaml'}") == (0, out, "")


def test_keys_are_listed_with_their_meaning(capsys):
    code, out, _ = run(capsys, "config", "--keys", "rollout")
    assert code == 0 and "rollout.oversample = 2.0\n    Groups that may be open" in out and "train.lr" not in out
    assert "train.lr = " in run(capsys, "config", "--keys")[1]
    assert run(capsys, "config", "--keys", "train.lr")[1].splitlines() == [
        "train.lr = 1e-06",
        "    Peak learning rate of AdamW.",
        "    Allowed: > 0",
    ]
    assert run(capsys, "config", "--keys", "nosuch")[0] == 2


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train"], "recipe"),
        (["train", "+recipe=math/arithmetic"], "recipe=GROUP/NAME"),
        (["train", "recipe=math/arithmetic", "stepz=3"], "did you mean steps?"),
        (["train", "recipe=math/arithmetic", "train.zero_stage=0"], "train.zero_stage"),
        (["check", "recipe=math/arithmetic", "steps=abc"], "steps"),
        (["check", "recipe=math/arithmetic", "data.train.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["eval", "recipe=math/arithmetic", "model.path=./nowhere"], "nowhere"),
        (["sft", "recipe=math/gsm8k"], "sft."),
        (["nosuch"], "nosuch"),
        ([], "COMMAND"),
        (["train", "--steps", "3"], "--help"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, argv, expected):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("rlpost: ") and err.count("\n") == 1 and expected in err


def test_an_unusable_run_directory_is_exit_code_3(capsys):
    code, _, err = run(capsys, "check", "recipe=math/arithmetic", "runs_dir=/proc/rlpost")
    assert code == 3 and "run directory" in err


def test_interrupts_and_run_errors_from_the_run_itself(capsys, monkeypatch):
    def stop(error):
        def run_it(arguments):
            raise error

        monkeypatch.setattr(cli, "run_recipes", run_it)
        return run(capsys, "recipes")

    assert stop(KeyboardInterrupt())[0] == 130
    code, _, err = stop(RunError("stopped"))
    assert (code, err) == (3, "rlpost: stopped\n")
    code, _, err = stop(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"))
    assert code == 3 and "writing runs/x/metrics.jsonl: No space left on device; " in err and err.count("\n") == 1
    with pytest.raises(IsADirectoryError):
        stop(IsADirectoryError(errno.EISDIR, "Is a directory"))
    code, _, err = stop(SystemExit(0))  # a user's part that calls exit() must not look like success
    assert code == 3 and "called exit(0)" in err
    with pytest.raises(ZeroDivisionError):  # our own bugs keep their traceback
        stop(ZeroDivisionError())


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m rlpost config --keys | head -1", shell=True, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.startswith("name = ") and done.stderr == ""


@pytest.mark.parametrize(("command", "expected"), [("train", 3), ("check", 0)])
def test_a_run_that_lost_its_reader_does_not_end_as_a_success(command, expected):
    code = (
        "import sys; from rlpost.cli import commands as cli\n"
        f"def run_{command}(arguments): raise BrokenPipeError\n"
        f"cli.run_{command} = run_{command}; sys.exit(cli.main(['{command}', 'recipe=math/arithmetic']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == expected and ("was closed" in done.stderr) == bool(expected)

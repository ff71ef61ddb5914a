"""`rlpost sft` from nothing, and the model it leaves evaluated; docs/sft.md as it is written. A few steps each."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .program import SMALL, read_metrics, rlpost

PAGE = Path(__file__).parents[2] / "docs" / "sft.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    output = rlpost("sft", "recipe=math/arithmetic", "sft.steps=6", "sft.tokens_per_step=1024", cwd=folder)
    return folder, output


def test_the_loss_falls_and_the_folder_is_whole(made):
    folder, output = made
    model = folder / "runs/arithmetic-sft/model"
    assert "step 6/6" in output and f"model.path={model.relative_to(folder)}" in output
    assert {p.name for p in model.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((model / "config.json").read_text())["eos_token_id"] == 16
    assert float(output.split("nll ")[-1].split()[0]) < 2.9, "log(18) = 2.89 is where it starts"


def test_the_model_can_be_evaluated(made):
    folder, _ = made
    output = rlpost(
        "eval", "recipe=math/arithmetic", "model.path=runs/arithmetic-sft/model", "eval.max_prompts=5", cwd=folder
    )
    assert "5, 4 responses each, 20 in all" in output and "pass@4" in output and "95 % interval" in output


def test_two_workers_with_engines_train_the_same_as_one_without(tmp_path):
    """The losses agree; on two workers the responses are generated and scored as well."""
    (tmp_path / "make_data.py").write_text(fence("python"))
    (tmp_path / "mine.yaml").write_text(fence("yaml"))
    subprocess.run([sys.executable, "make_data.py"], cwd=tmp_path, check=True)
    short = [*SMALL, "data.train.limit=100", "data.eval.limit=20", "sft.epochs=1", "sft.tokens_per_step=1024"]
    two = ["name=two", "cluster=ray", "cluster.num_workers=2", "sft.generate_every=0"]
    runs = []
    for own in (["name=one"], two):
        output = rlpost("sft", "recipe=mine.yaml", *short, *own, cwd=tmp_path)
        runs.append(read_metrics(tmp_path / "runs" / f"{own[0].removeprefix('name=')}-sft"))
    for name in ("loss/nll", "eval/loss"):
        one, other = ([row[name] for row in run if name in row] for run in runs)
        assert len(one) == len(other) >= 2 and one == pytest.approx(other, abs=2e-3)
    scored = [row["step"] for row in runs[1] if "eval/accuracy" in row]
    assert scored == [0, max(row["step"] for row in runs[1])]
    assert re.search(r"accuracy on data.eval: [\d.]+ % before, [\d.]+ % after", output)


def fence(language: str) -> str:
    """The page's only block in this language."""
    (body,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return body


def test_the_page_is_walked_as_it_is_written(tmp_path):
    """Every file and command of docs/sft.md, each command cut short by more settings."""
    (tmp_path / "make_data.py").write_text(fence("python"))
    (tmp_path / "mine.yaml").write_text(fence("yaml"))
    short = [*SMALL, "steps=2", "rollout.max_response_tokens=64", "eval.max_prompts=20"]
    short += ["data.train.limit=100", "sft.tokens_per_step=1024"]
    outputs = {}
    for line in fence("sh").splitlines():
        words = shlex.split(line)
        if words[0] == "python":
            subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True)
        else:
            more = [] if words[1] == "export" else short
            outputs.setdefault(words[1], []).append(rlpost(*words[1:3], *more, *words[3:], cwd=tmp_path))
    assert "data.train: 100 rows from train.jsonl" in outputs["check"][0]
    drawn = [json.loads(row) for row in (tmp_path / "runs/mine-sft/drawn.jsonl").read_text().splitlines()]
    assert [uid for row in drawn for uid in row["uids"]] == [f"{epoch}:{n}" for epoch in range(2) for n in range(100)]
    first, last = re.search(r"loss on data.eval: ([\d.]+) before, ([\d.]+) after", outputs["sft"][0]).groups()
    assert float(last) < float(first)
    assert len(outputs["eval"]) == 2 and "runs/mine-sft/model" in outputs["eval"][0]
    assert "Accuracy after" in outputs["train"][0]
    assert {p.name for p in (tmp_path / "my-model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}

"""`rlpost sft` as a run, the real trainer on a tiny model: what is drawn, what is measured, what a resume keeps."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

from rlpost.config import Config
from rlpost.durable.stopping import Stopped
from rlpost.errors import ConfigError, DataError, RunError
from rlpost.preflight.checks import check
from rlpost.sft.loop import run_sft
from rlpost.sft.run import SftRun
from tests.tiny_models import write_model

NUM_ROWS = 23


class Killed(BaseException):
    """Ends a run as a kill would: nothing is caught, nothing saved."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model's folder, training rows of two to four messages, and held-out ones."""
    root = tmp_path_factory.mktemp("world")
    write_model(root / "model", weights=True)
    rows = []
    for n in range(NUM_ROWS + 5):
        talk = [{"role": "user", "content": f"{n} plus one?"}, {"role": "assistant", "content": f"{n + 1}"}]
        talk += [{"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes " * (n % 5)}] * (n % 2)
        rows.append(json.dumps({"talk": talk}) + "\n")
    (root / "train.jsonl").write_text("".join(rows[:NUM_ROWS]))
    (root / "held_out.jsonl").write_text("".join(rows[NUM_ROWS:]))
    return root


@pytest.fixture
def cfg(world, tmp_path, monkeypatch) -> Config:
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):  # written by a run; put back after it
        monkeypatch.setenv(name, os.environ.get(name, ""))
    cfg = Config(name="talk", runs_dir=str(tmp_path / "runs"), device="cpu", deterministic=True)
    cfg.data.train.path, cfg.data.eval.path = str(world / "train.jsonl"), str(world / "held_out.jsonl")
    cfg.sft.init, cfg.sft.messages_key = str(world / "model"), "talk"
    cfg.sft.epochs, cfg.sft.tokens_per_step, cfg.sft.eval_every = 2, 160, 4
    cfg.sft.lr, cfg.sft.warmup_steps = 1e-2, 2
    cfg.train.max_row_tokens = 96
    cfg.checkpoint.every = 3
    cfg.logging.wandb, cfg.logging.progress = "disabled", "lines"
    check(cfg, "sft")
    return cfg


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def interrupt(monkeypatch, step: int, how) -> None:
    """``how()`` is called once, when ``step`` steps are settled."""
    settle = SftRun.settle

    def settle_and_interrupt(run, *arguments):
        settle(run, *arguments)
        if run.step == step:
            monkeypatch.setattr(SftRun, "settle", settle)
            how()

    monkeypatch.setattr(SftRun, "settle", settle_and_interrupt)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """An uninterrupted run's folder."""
    with pytest.MonkeyPatch.context() as patch:
        made = cfg.__wrapped__(world, tmp_path_factory.mktemp("whole"), patch)  # type: ignore[attr-defined]
        made.logging.tensorboard = True
        return run_sft(made).parent


def test_each_epoch_trains_on_every_row_once(whole) -> None:
    ledger = lines(whole / "drawn.jsonl")
    drawn = [uid for row in ledger for uid in row["uids"]]
    assert drawn == [f"{epoch}:{n}" for epoch in range(2) for n in range(NUM_ROWS)]
    assert [row["step"] for row in ledger] == list(range(1, len(ledger) + 1))
    steps = [row for row in lines(whole / "metrics.jsonl") if "loss/tokens" in row]
    assert [row["loss/sequences"] for row in steps] == [len(row["uids"]) for row in ledger]
    assert all(row["sft/tokens"] >= 160 for row in steps[:-1]), "a step is filled; the last one has what is left"
    assert steps[-1]["sft/epoch"] == 2.0 and steps[-1]["total/samples"] == 2 * NUM_ROWS
    summary = json.loads((whole / "finished.json").read_text())
    assert summary["steps"] == len(ledger) and summary["totals"]["samples"] == 2 * NUM_ROWS


def test_the_loss_on_held_out_rows_is_measured_and_falls(whole) -> None:
    evaluations = [row for row in lines(whole / "metrics.jsonl") if "eval/loss" in row]
    last = json.loads((whole / "finished.json").read_text())["steps"]
    assert [row["step"] for row in evaluations] == sorted({0, *range(0, last, 4), last})
    assert evaluations[-1]["eval/loss"] < 0.6 * evaluations[0]["eval/loss"]
    assert len({row["eval/tokens"] for row in evaluations}) == 1


def test_the_loss_is_that_of_transformers(whole, world) -> None:
    """The final loss, computed from the exported folder with nothing of ours but the masks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(whole / "model"))
    model = AutoModelForCausalLM.from_pretrained(str(whole / "model")).float()
    total, count = 0.0, 0
    for row in lines(world / "held_out.jsonl"):
        text = tokenizer.apply_chat_template(row["talk"], tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1).detach()
        speaks, start = False, tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
        for t in range(1, len(ids)):
            if ids[t - len(start) : t] == start:
                speaks = True
            if speaks:
                total, count = total - float(logprobs[t - 1, ids[t]]), count + 1
            if ids[t] == tokenizer.eos_token_id:
                speaks = False
    (evaluation,) = [row for row in lines(whole / "metrics.jsonl") if "eval/loss" in row][-1:]
    assert count == evaluation["eval/tokens"]
    assert total / count == pytest.approx(evaluation["eval/loss"], abs=1e-4)


@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(how, cfg, whole, monkeypatch) -> None:
    def end() -> None:
        if how == "Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            raise Killed

    interrupt(monkeypatch, 5, end)
    with pytest.raises(Stopped if how == "Ctrl-C" else Killed):
        run_sft(cfg)
    run = Path(cfg.runs_dir) / "talk-sft"
    newest = sorted((run / "checkpoints").iterdir())[-1].name
    assert newest == ("step-000005" if how == "Ctrl-C" else "step-000003")
    assert len(lines(run / "drawn.jsonl")) == 5 and not (run / "finished.json").exists()
    model = run_sft(cfg)
    assert model == run / "model"
    assert weights(model) == weights(whole / "model")
    assert (run / "drawn.jsonl").read_text() == (whole / "drawn.jsonl").read_text()
    assert lines(run / "metrics.jsonl") == lines(whole / "metrics.jsonl")


def test_a_finished_run_is_left_alone(cfg, whole) -> None:
    cfg.runs_dir, cfg.sft.epochs, cfg.sft.steps = str(whole.parent), None, 1
    before = weights(whole / "model")
    assert run_sft(cfg) == whole.parent / "talk-sft-2" / "model"
    assert weights(whole / "model") == before


def test_a_resume_with_other_data_is_refused(cfg, world, tmp_path, monkeypatch) -> None:
    interrupt(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        run_sft(cfg)
    other = tmp_path / "other.jsonl"
    other.write_text((world / "train.jsonl").read_text().replace("plus one", "minus one"))
    cfg.deterministic = False
    cfg.data.train.path = str(other)
    with pytest.raises(DataError, match="resuming: content: got"):
        run_sft(cfg)
    cfg.data.train.path, cfg.deterministic, cfg.sft.lr = str(world / "train.jsonl"), True, 2e-2
    with pytest.raises(RunError, match="resuming with deterministic=true: sft.lr"):
        run_sft(cfg)
    ledger = Path(cfg.runs_dir) / "talk-sft" / "checkpoints" / "step-000004" / "drawn.jsonl"
    assert len(lines(ledger)) == 4


def test_lessons_of_a_generator_go_on_where_they_stopped(cfg, monkeypatch) -> None:
    lessons = {"_target_": "tests.sft.lessons.count", "step": 1}
    cfg.sft.generator, cfg.sft.messages_key, cfg.sft.epochs, cfg.sft.steps = lessons, None, None, 7
    cfg.sft.max_example_tokens, cfg.sft.long_examples, cfg.sft.eval_every = 12, "drop", None
    expected = run_sft(cfg).parent
    assert lines(expected / "metrics.jsonl")[-1]["sft/dropped"] > 0
    assert not any("eval/loss" in row for row in lines(expected / "metrics.jsonl"))
    cfg.name = "again"
    interrupt(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped):
        run_sft(cfg)
    cfg.deterministic = False
    cfg.sft.generator = {**lessons, "step": 2}
    with pytest.raises(DataError, match="resuming: sft.generator: got 'other lessons than before'"):
        run_sft(cfg)
    cfg.deterministic, cfg.sft.generator = True, lessons
    resumed = run_sft(cfg).parent
    assert weights(resumed / "model") == weights(expected / "model")
    assert (resumed / "drawn.jsonl").read_text() == (expected / "drawn.jsonl").read_text()


def test_an_update_that_is_not_finite_ends_the_run(cfg) -> None:
    cfg.sft.lr, cfg.sft.warmup_steps, cfg.sft.grad_clip = 1e38, 0, 0.0
    with pytest.raises(RunError, match=r"sft step \d: loss: got nan; expected a finite loss and gradient"):
        run_sft(cfg)
    status = json.loads((Path(cfg.runs_dir) / "talk-sft" / "status.json").read_text())
    assert status["state"] == "failed"


def test_the_viewers_open_it(whole, tmp_path) -> None:
    from rlpost.export import export
    from rlpost.viewing.report.build import write_report
    from rlpost.viewing.run_list import compare_runs, describe_runs
    from rlpost.viewing.watch import watch

    assert "loss" in str(write_report([whole], tmp_path / "report.html").path.read_text())
    (line,) = [line for line in describe_runs(whole.parent).splitlines() if line.startswith("talk-sft ")]
    last = json.loads((whole / "finished.json").read_text())["steps"]
    assert "finished" in line and f"{last}/{last}" in line and "loss " in line
    assert "no setting differs" in compare_runs(whole, whole)
    watch(whole, once=True)
    export(whole, tmp_path / "exported")
    assert weights(tmp_path / "exported") == weights(whole / "model")
    for card in (tmp_path / "exported", whole / "model"):
        text = (card / "README.md").read_text()
        assert "supervised fine-tuning" in text and "Loss on data.eval after step 0" in text
    assert list((whole / "tensorboard").iterdir())


def test_commands_do_not_take_each_others_runs(whole, tmp_path) -> None:
    from rlpost.durable.run_state import find_to_resume

    with pytest.raises(
        RunError, match="made by `rlpost sft`.; expected one of `rlpost train`; set name= to another run"
    ):
        find_to_resume(whole / "checkpoints", None, kind="train", say=print)


def test_the_ledger_of_a_checkpoint_is_held_to_its_count(cfg, monkeypatch, capsys) -> None:
    interrupt(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped):
        run_sft(cfg)
    from rlpost.durable.checkpoint import write_manifest

    folder = Path(cfg.runs_dir) / "talk-sft" / "checkpoints" / "step-000004"
    rows = (folder / "drawn.jsonl").read_text().splitlines(keepends=True)
    (folder / "drawn.jsonl").write_text("".join(rows[1:]))
    (folder / "manifest.json").unlink()
    write_manifest(folder)
    with pytest.raises(RunError, match=r"drawn.jsonl: got '\d+ draws'; expected \d+, as were made"):
        run_sft(cfg)
    assert "resumed after" not in capsys.readouterr().out, "it is known before the trainer starts"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": None}, ConfigError, "sft.steps: got neither sft.steps nor sft.epochs; expected exactly one"),
        ({"steps": 3}, ConfigError, "sft.steps: got both sft.steps and sft.epochs; expected exactly one"),
        ({"generate_every": 0, "init": None}, ConfigError, "sft.generate_every: got 0; expected -1 without sft.init"),
        (
            {"response_key": "answer"},
            ConfigError,
            "sft.response_key: got 'answer'; expected null beside sft.messages_key",
        ),
        ({"messages_key": None}, DataError, "train.jsonl line 1: no column 'prompt'"),
        (
            {"max_example_tokens": 513},
            ConfigError,
            "sft.max_example_tokens: got 513; expected <= 512, the model's context",
        ),
        (
            {"generator": {"_target_": "tests.sft.lessons.count"}},
            ConfigError,
            "sft.epochs: got 2; expected null with sft.g",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_loads(change, error, message, cfg) -> None:
    for key, value in change.items():
        setattr(cfg.sft, key, value)
    with pytest.raises(error) as caught:
        check(cfg, "sft")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_prefill_belongs_into_the_responses(cfg) -> None:
    cfg.data.prefill = "<think>"
    with pytest.raises(ConfigError, match="data.prefill: got '<think>'; expected null: a row's response is whole"):
        check(cfg, "sft")


def test_rows_are_measured_before_the_model_loads(cfg, monkeypatch) -> None:
    cfg.sft.max_example_tokens = 20
    monkeypatch.setattr("rlpost.train.deepspeed_trainer.build_trainer", lambda *a, **k: pytest.fail("the model loads"))
    with pytest.raises(DataError, match=r"train.jsonl line \d+: the example has \d+ tokens; expected at most 20"):
        run_sft(cfg)
    assert not Path(cfg.runs_dir).exists(), "a refused run leaves nothing"


def test_epochs_are_not_resumed_with_steps_of_another_size(cfg, monkeypatch) -> None:
    cfg.deterministic = False  # which refuses every change
    interrupt(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped):
        run_sft(cfg)
    cfg.sft.tokens_per_step //= 2
    with pytest.raises(RunError, match=r"resuming: sft.tokens_per_step: got \d+; expected \d+, with sft.epochs"):
        run_sft(cfg)


def test_a_lesson_is_a_mapping() -> None:
    from rlpost.sft.draws import LessonDraws

    draws = LessonDraws(lambda: iter([("a", "b")]), encoder=None)
    with pytest.raises(DataError, match="lesson 1: got a list; expected a mapping with prompt and response"):
        draws.draw()

"""Models as users bring them, trained for a step: what ends a response, and a chat template that reads the clock."""

from __future__ import annotations

import json

import pytest

from tests.tiny_models import CHATML, DATED, THINKING, make_tokenizer, write_model

from .program import rlpost, rollouts_of

ROWS = [{"prompt": f"What is {n}+1?", "answer": str(n + 1)} for n in range(4)]
SMALL = [
    *("recipe=math/arithmetic", "data.train.path=d.jsonl", "data.train.generator=null", "eval.every=-1", "device=cpu"),
    *(
        "rollout.groups_per_step=2",
        "rollout.samples_per_group=2",
        "rollout.oversample=1",
        "rollout.max_response_tokens=64",
    ),
    *("checkpoint.every=1", "logging.wandb=disabled", "reward.function=digit_share", "engine.max_slots=8"),
]


def write_rows(folder):
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def unfinish(run):
    """As a run is that was killed after its last checkpoint."""
    (run / "finished.json").unlink()


def test_a_template_that_reads_the_clock_resumes(tmp_path):
    """Its microseconds would differ in every process: the start stands in the checkpoint."""
    write_rows(tmp_path)
    write_model(tmp_path / "m", tokenizer=make_tokenizer(chat=DATED), weights=True)
    rlpost("train", *SMALL, "model.path=m", "steps=1", "name=dated", cwd=tmp_path)
    runs = tmp_path / "runs"
    unfinish(runs / "dated")
    assert "resumed after step 1" in rlpost("train", *SMALL, "model.path=m", "steps=2", "name=dated", cwd=tmp_path)
    rlpost("train", *SMALL, "model.path=m", "steps=3", "name=other", "resume=runs/dated", cwd=tmp_path)
    checkpoints = [*(runs / "dated" / "checkpoints").iterdir(), *(runs / "other" / "checkpoints").iterdir()]
    starts = {json.loads((folder / "state.json").read_text())["started"] for folder in checkpoints}
    assert len(starts) == 1 and len(checkpoints) >= 3


def test_a_chat_template_of_the_runs_own_is_exported_and_kept_on_resume(tmp_path):
    write_rows(tmp_path)
    write_model(tmp_path / "m", tokenizer=make_tokenizer(chat=CHATML), weights=True)
    (tmp_path / "mine.jinja").write_text(THINKING)
    chat = ["data.chat_template=mine.jinja", "data.chat_template_kwargs.enable_thinking=true", "data.prefill=<think>"]
    arguments = ["train", *SMALL, "model.path=m", "name=chat", *chat]
    rlpost(*arguments, "steps=1", cwd=tmp_path)
    run = tmp_path / "runs" / "chat"
    rlpost("export", str(run), "exported", cwd=tmp_path)
    for folder in (run / "model", tmp_path / "exported"):
        assert (folder / "chat_template.jinja").read_text() == THINKING
        assert '| Responses begin with | `` "<think>" `` |' in (folder / "README.md").read_text()
    unfinish(run)
    for change in ("data.prefill=So", "data.chat_template_kwargs.enable_thinking=false data.prefill=null"):
        said = rlpost(*arguments, "steps=2", *change.split(), cwd=tmp_path, expect=2)
        assert "the prompts differ" in said
    assert "resumed after step 1" in rlpost(*arguments, "steps=2", cwd=tmp_path)


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_the_models_end_tokens_end_responses(tmp_path, where):
    """Every token is an end token, so a response has one; the tokenizer's own is only one of them."""
    write_rows(tmp_path)
    tokenizer = make_tokenizer()
    ends = {"eos_token_id": list(range(len(tokenizer)))}
    given = {"generation": ends} if where == "generation_config.json" else ends
    write_model(tmp_path / "m", tokenizer=tokenizer, weights=True, **given)
    rlpost("train", *SMALL, "model.path=m", "steps=1", "name=ends", cwd=tmp_path)
    (rows,) = rollouts_of(tmp_path / "runs" / "ends").values()
    assert [len(row["token_ids"]) for row in rows] == [1] * 4

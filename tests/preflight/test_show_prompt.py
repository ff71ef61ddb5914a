"""``rlpost check --show-prompt``: the tokens are the run's own, and the page is readable and safe."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.cells import cell_len

from rlpost import session
from rlpost.cli import commands
from rlpost.config.compose import load_config
from rlpost.errors import UserError
from rlpost.preflight.show_prompt import NUM_SHOWN, WIDTH, find_prompts, show_prompts, split_at_tokens
from rlpost.session import open_session
from tests.tiny_models import ALTERNATING, THINKING, make_tokenizer, write_model

HOSTILE = "a │ bar, \x1b[31m red\u202e, tab\there  spaces 😀 日本語\r\n\n«quotes» <|im_end|> ‥ " + "x" * 200


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A configuration for rows and a tokenizer; no part of it touches this process's environment."""
    monkeypatch.setattr(session, "write_environment", lambda **_: None)

    def make(rows, *overrides, **tokenizer):
        write_model(tmp_path / "model", tokenizer=make_tokenizer(**tokenizer), max_position_embeddings=4096)
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps({"prompt": row, "answer": "1"}) + "\n" for row in rows))
        files = [f"model.path={tmp_path / 'model'}", f"data.train.path={path}", "data.train.generator=null"]
        fixed = ["recipe=math/arithmetic", "device=cpu", "eval.every=-1", f"runs_dir={tmp_path / 'runs'}"]
        return load_config([*fixed, *files, "rollout.max_response_tokens=32", *overrides])

    return make


@pytest.mark.parametrize(
    ("tokenizer", "overrides"),
    [
        ({"chat": THINKING}, ["data.chat_template_kwargs={enable_thinking: false}"]),
        ({"chat": THINKING}, ["data.prefill=<think>"]),
        ({"chat": ALTERNATING, "bos": "<|endoftext|>"}, []),
        ({"chat": None, "bos": "<|endoftext|>", "add_bos": True, "add_eos": True}, ["data.prefill= the sum"]),
        ({"chat": THINKING}, ["data.chat=never"]),
        ({"chat": None}, ["data.chat_template={{ messages[0].content }} ="]),
    ],
)
def test_the_tokens_are_those_of_the_run(make, tokenizer, overrides):
    cfg = make(["What is 1+1?", HOSTILE, "two"], *overrides, **tokenizer)
    _, _, shown = find_prompts(cfg, "train")
    opened = open_session(cfg)
    opened.close()
    run = [tuple(prompt.token_ids.tolist()) for prompt in opened.train_sets[0].prompts]
    assert [prompt.token_ids for prompt in shown] == [run[0], run[1]]
    assert "d.jsonl line 1\n" in shown[0].title and "d.jsonl line 2\n" in shown[1].title
    assert f"longest prompt of 3 in data.train: {len(run[1]):,} tokens of 4,064 allowed" in shown[1].title
    assert "Decoded, these tokens" not in show_prompts(cfg, "train")


def test_a_page(make):
    cfg = make(["What is 1+1?"], "data.prefill=<think>", chat=THINKING)
    assert show_prompts(cfg, "train").replace(str(cfg.data.train.path), "d.jsonl") == (
        "Prompts as the model gets them: the tokenizer's chat template\n"
        "  │  between two tokens, and at the end\n"
        "  «  « » around a special token\n"
        "  ↵  a line break\n"
        "\n"
        "The only prompt of 1 in data.train: 24 tokens of 4,064 allowed\n"
        "  d.jsonl line 1\n"
        "\n"
        "  «<|im_start|>»│u│s│er│↵\n"
        "  │What│ is│ │1│+│1│?│«<|im_end|>»│↵\n"
        "  │«<|im_start|>»│a│s│s│is│t│an│t│↵\n"
        "  │«<think>»│\n"
        "The response begins here, after data.prefill.\n"
        "\n"
        "Responses end at: <|im_end|> (2)"
    )


def test_the_page_is_narrow_and_safe_whatever_the_row_holds(make):
    text = show_prompts(make([HOSTILE * 3], chat=THINKING), "train")
    body = text[text.index("line 1\n") :]
    assert all(cell_len(line) <= WIDTH for line in body.splitlines())
    assert all(line.isprintable() for line in text.split("\n"))
    for shown in ("\\x1b", "\\u202e", "\\t", "\\r", "\\u2502", "«<|im_end|>»"):
        assert shown in body
    assert "│😀│‥" in body and "a token that is the rest of the character before it" in text


def test_a_token_longer_than_a_line(make):
    from transformers import AutoTokenizer

    cfg = make(["a" + "日" * 100 + "b"], chat=THINKING)
    tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
    tokenizer.add_tokens(["日" * 100])
    tokenizer.save_pretrained(cfg.model.path)
    text = show_prompts(cfg, "train")
    assert all(cell_len(line) <= WIDTH for line in text.splitlines() if "d.jsonl" not in line)
    assert text.replace("\n  ", "").count("日" * 100 + "│b│") == 1


def test_nothing_of_the_text_is_left_out():
    """Also where a tokenizer leaves blanks out of a token's characters, as GPT-2's does."""
    from tokenizers import processors

    text = " What  is the sum😀?\n\n The  answer <|im_end|> x "
    for trim in (False, True):
        tokenizer = make_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
        ids = tokenizer.encode(text)
        pieces = split_at_tokens(tokenizer, text, ids, add_special_tokens=True)
        assert len(pieces) == len(ids)
        joined = "".join(pieces).replace("‥", "").replace("«", "").replace("»", "").replace("↵", "\n")
        assert joined.rstrip() == text.rstrip()


def test_a_tokenizer_that_gives_no_characters_shows_its_vocabulary():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    ids = tokenizer.encode("é\n")
    assert split_at_tokens(tokenizer, "é\n", ids, add_special_tokens=True) == ["Ã", "©", "↵", "«</s>»"]


def test_a_long_prompt_is_cut_in_the_middle(make):
    text = show_prompts(make(["777" + "+ " * 1500 + "888"]), "train")
    assert "tokens left out" in text and "7│7│7" in text and "8│8│8" in text
    assert text.count("│") < NUM_SHOWN + 30


def test_a_tokenizer_that_loses_text_is_told(tmp_path, make):
    """The demo's model knows digits and signs only."""
    cfg = make(["1+1?", "one and 1?"], "model.path=rlpost://arithmetic")
    text = show_prompts(cfg, "train")
    assert text.count("Decoded, these tokens give another text") == 1 and "plain text, without" in text


def test_where_the_response_begins(make):
    row = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The sum is"}]
    text = show_prompts(make([row, "r"], chat=THINKING), "train")
    assert "The response begins here, after the assistant's words in the row." in text
    assert "The first prompt, also the longest, of 2 in" in text


def test_dropped_rows_are_not_shown(make):
    cfg = make(["a", "b" * 100, "cc"], "data.max_prompt_tokens=20", "data.long_prompts=drop", chat=None)
    text = show_prompts(cfg, "train")
    assert "longest prompt of 2 in data.train: 2 tokens of 20 allowed" in text and "line 3" in text


def test_what_cannot_be_shown(make, tmp_path, monkeypatch):
    cfg = make(["a"])
    with pytest.raises(UserError, match="check --show-prompt: got '--for sft'; expected train or eval"):
        show_prompts(cfg, "sft")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    cfg.model.path = "some-org/some-model"
    with pytest.raises(UserError, match="expected a model in a folder or the local cache; download it first"):
        show_prompts(cfg, "train")


def test_the_command_prints_what_the_terminal_can_show(make, tmp_path, monkeypatch):
    cfg = make(["é?"], chat=THINKING)
    overrides = [f"model.path={cfg.model.path}", f"data.eval.path={cfg.data.train.path}", "data.eval.generator=null"]
    arguments = ["check", "recipe=math/arithmetic", f"runs_dir={tmp_path}", "rollout.max_response_tokens=32"]
    for encoding, shown in (("utf-8", "│é│‥│?│"), ("ascii", "\\u2502\\xe9\\u2502\\u2025\\u2502?\\u2502")):
        written = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", written)
        assert commands.main([*arguments, *overrides, "--for", "eval", "--show-prompt"]) == 0
        monkeypatch.undo()
        written.seek(0)
        text = written.read()
        assert shown in text and "of 1 in data.eval" in text and "Data for evaluation" in text

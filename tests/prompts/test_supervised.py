"""Examples for supervised training, with real tokenizers and rendered templates: which tokens are trained on."""

from __future__ import annotations

import json
from datetime import datetime

import numpy as np
import pytest

from rlpost.config import DataConfig, SFTConfig, SourceConfig
from rlpost.errors import ConfigError, DataError
from rlpost.prompts.encoding import build_prompts
from rlpost.prompts.rows import Row
from rlpost.prompts.sources import load_rows
from rlpost.prompts.supervised import ExampleEncoder, digest_examples, load_example_rows
from tests.tiny_models import ALTERNATING, CHATML, DATED, THINKING, make_tokenizer

NOW = datetime(2026, 11, 30, 10, 0, 0, 123456)
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n",
)
TALK = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 2+2?"},
    {"role": "assistant", "content": "The answer is four."},
]


def encode(rows, *, chat=CHATML, tokenizer=None, data=None, limit=None, **sft):
    tokenizer = tokenizer or make_tokenizer(chat=chat, bos="<|endoftext|>")
    encoder = ExampleEncoder(
        data or DataConfig(),
        SFTConfig(**sft),
        tokenizer,
        stop_token_ids=[tokenizer.eos_token_id],
        max_tokens=limit,
        started=NOW,
    )
    rows = [Row(columns, f"d.jsonl line {n}") for n, columns in enumerate(rows, start=1)]
    return encoder.encode_rows(rows, "data.train"), tokenizer


def trained_on(example, tokenizer):
    """The trained text, runs separated by |."""
    runs = np.split(np.arange(len(example.loss_mask)), np.flatnonzero(np.diff(example.loss_mask)) + 1)
    return "|".join(tokenizer.decode(example.token_ids[run]) for run in runs if example.loss_mask[run[0]])


@pytest.mark.parametrize("chat", [CHATML, MARKED, ALTERNATING, DATED], ids=["chatml", "marked", "alternating", "dated"])
def test_the_assistants_turns_with_their_end_token_are_trained_on(chat) -> None:
    made, tokenizer = encode([{"talk": TALK}], chat=chat, messages_key="talk")
    (example,) = made.examples
    assert trained_on(example, tokenizer) == "2<|im_end|>|The answer is four.<|im_end|>"
    assert "What is 1+1?" in tokenizer.decode(example.token_ids) and not example.loss_mask[0]


def test_marks_around_the_words_only_still_train_the_end_token() -> None:
    talk = [*TALK[:3], {"role": "assistant", "content": "<think>hm</think>4"}]
    made, tokenizer = encode([{"talk": talk}], chat=THINKING, messages_key="talk")
    # This template marks whatever role speaks, so the users' words are trained on as it says.
    assert trained_on(made.examples[0], tokenizer).endswith("|<think>hm</think>4<|im_end|>")


@pytest.mark.parametrize("chat", [CHATML, MARKED], ids=["chatml", "marked"])
def test_a_prompt_with_a_response_is_what_rl_would_sample_from(chat) -> None:
    """The prompt's tokens are those of RL; only the response is trained on, whatever the prompt's turns say."""
    rows = [{"prompt": "What is 2+2?", "response": "four"}, {"prompt": TALK[:3], "response": "\nfour"}]
    data = DataConfig(template="Q: {prompt}", system_prompt="Be brief.", reference_key=None)
    made, tokenizer = encode(rows, chat=chat, data=data)
    prompts = build_prompts([Row(row, "r") for row in rows], data, tokenizer, max_prompt_tokens=None).prompts
    for example, prompt, words in zip(made.examples, prompts, ("four", "\nfour"), strict=True):
        known = len(prompt.token_ids)
        assert example.token_ids[:known].tolist() == prompt.token_ids.tolist()
        assert not example.loss_mask[:known].any() and example.loss_mask[known]
        assert trained_on(example, tokenizer) == f"{words}<|im_end|>"


def test_without_a_chat_template_it_is_prompt_response_end_token() -> None:
    made, tokenizer = encode([{"prompt": "1+1=", "response": "2"}], chat=None)
    (example,) = made.examples
    assert example.token_ids.tolist() == [*tokenizer.encode("1+1="), *tokenizer.encode("2"), tokenizer.eos_token_id]
    assert example.loss_mask.tolist() == [False] * 4 + [True] * 2
    whole, _ = encode([{"prompt": "1+1=", "response": "2"}], chat=None, loss_on="all")
    assert whole.examples[0].loss_mask.tolist() == [False] + [True] * 5


def test_rows_of_another_format_are_prompts_with_answers(tmp_path) -> None:
    turns = [{"from": "human" if n % 2 == 0 else "gpt", "value": m["content"]} for n, m in enumerate(TALK)]
    (tmp_path / "d.jsonl").write_text(json.dumps({"conversations": turns}))
    source = SourceConfig(path=str(tmp_path / "d.jsonl"))
    (row,) = load_rows(source, format="sharegpt")
    made, tokenizer = encode([row], data=DataConfig(format="sharegpt"))
    (example,) = made.examples
    assert trained_on(example, tokenizer) == "The answer is four.<|im_end|>"
    whole, _ = encode([{"talk": TALK}], messages_key="talk")
    assert example.token_ids.tolist() == whole.examples[0].token_ids.tolist()


TWO_BLOCKS = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}<think>{% endgeneration %}--{% generation %}{{ m['content'] }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}",
)


def test_marks_of_earlier_turns_are_not_those_of_the_response() -> None:
    prompt = [*TALK, {"role": "user", "content": "and 3?"}]
    made, tokenizer = encode([{"prompt": prompt, "response": "six"}], chat=MARKED)
    assert trained_on(made.examples[0], tokenizer) == "six<|im_end|>"
    with pytest.raises(DataError, match="line 1: got an empty turn of the assistant"):
        encode([{"prompt": prompt, "response": ""}], chat=MARKED)
    with pytest.raises(DataError, match="line 1: got an empty turn of the assistant"):
        encode([{"talk": [*TALK[:3], {"role": "assistant", "content": ""}]}], chat=MARKED, messages_key="talk")


def test_all_blocks_of_a_response_are_trained_and_nothing_behind_its_end() -> None:
    prompt = [*TALK, {"role": "user", "content": "and 3?"}]
    made, tokenizer = encode([{"prompt": prompt, "response": "six"}], chat=TWO_BLOCKS)
    assert trained_on(made.examples[0], tokenizer) == "<think>|six<|im_end|>"
    made, tokenizer = encode([{"talk": TALK}], chat=TWO_BLOCKS, messages_key="talk")
    assert trained_on(made.examples[0], tokenizer) == ("<think>|2<|im_end|>|<think>|The answer is four.<|im_end|>")


def test_loss_on_all_trains_every_token_but_the_first() -> None:
    for chat in (CHATML, MARKED):
        made, _ = encode([{"talk": TALK}], chat=chat, messages_key="talk", loss_on="all")
        mask = made.examples[0].loss_mask
        assert not mask[0] and mask[1:].all()


def test_no_token_spans_the_border_of_prompt_and_response() -> None:
    """As a whole, the prompt's last letter and the answer's first ones would be one token."""
    chat = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    made, tokenizer = encode([{"prompt": "What is t", "response": "he sum"}], chat=chat)
    (example,) = made.examples
    assert len(tokenizer.encode(" the", add_special_tokens=False)) == 1, "the case that this test is about"
    assert trained_on(example, tokenizer) == "he sum<|im_end|>"
    assert tokenizer.decode(example.token_ids) == "What is the sum<|im_end|>"


def test_long_examples_are_refused_or_dropped_and_counted_and_never_cut() -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b c d e f g h i j"}]
    with pytest.raises(DataError, match=r"line 2: the example has \d+ tokens; expected at most 20; set sft.long_ex"):
        encode(rows, limit=20)
    made, _ = encode(rows, limit=20, long_examples="drop")
    assert len(made.examples) == 1 and made.num_dropped == 1
    with pytest.raises(DataError, match="data.train: all 2 examples are longer than 5 tokens"):
        encode(rows, limit=5, long_examples="drop")


# Gemma's habit: the last turn is written without its end.
UNENDED = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '' if loop.last else '<|im_end|>' }}{% endfor %}"
)
FORGETFUL = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}")
ADVANCED = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else m['content'] | upper }}")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {"prompt": "a", "answer": "b"},
            {},
            "no column 'response'; its columns are prompt, answer; set sft.response_key",
        ),
        ({"prompt": "a", "response": None}, {}, "response: got null; expected the response as text"),
        ({"prompt": "a", "response": 3}, {}, "response: got a number; expected the response as text"),
        (
            {"prompt": TALK},
            {},
            "prompt: got a prompt that ends with the assistant's words; expected a prompt; set sft.me",
        ),
        ({"talk": "hello"}, {"messages_key": "talk"}, "talk: got text; expected a list of chat messages"),
        ({"talk": TALK[:1]}, {"messages_key": "talk"}, "talk: got only user; expected a message of the assistant"),
        ({"talk": TALK[1:]}, {"messages_key": "talk"}, "got a conversation that begins with the assistant"),
        ({"talk": TALK}, {"messages_key": "other"}, "no column 'other'; its columns are talk; set sft.messages_key"),
        (
            {"talk": TALK},
            {"messages_key": "talk", "chat": ADVANCED},
            "the chat template writes the conversation before me",
        ),
        (
            {"talk": TALK},
            {"messages_key": "talk", "chat": FORGETFUL},
            "the chat template writes the conversation before m",
        ),
        (
            {"talk": TALK[:2]},
            {"messages_key": "talk", "chat": UNENDED},
            "ends the assistant's turn with no token that en",
        ),
        (
            {"talk": TALK},
            {"messages_key": "talk", "chat": None},
            "got a conversation; expected a tokenizer with a chat te",
        ),
        ({"prompt": "", "response": "a"}, {"chat": None}, "got a prompt without tokens; expected at least one"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_row(row, options, message) -> None:
    with pytest.raises(DataError) as caught:
        encode([row], **options)
    assert str(caught.value).startswith("d.jsonl line 1") and message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_of_any_format_and_of_several_sources_one_after_the_other(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Add", "input": "1 1", "output": "2"}) + "\n")
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    data = DataConfig()
    data.train.sources = {
        "a": {"path": str(tmp_path / "a.jsonl"), "format": "alpaca"},
        "b": {"path": str(tmp_path / "b.jsonl"), "format": "sharegpt"},
    }
    made, tokenizer = encode(list(load_example_rows(data, "train")), response_key="answer")
    assert [trained_on(one, tokenizer) for one in made.examples] == ["2<|im_end|>", "hello<|im_end|>"]
    for source in data.train.sources.values():
        source["weight"] = 2.0
    with pytest.raises(ConfigError, match=r"data.train.sources.a.weight: got 2.0; expected none with `rlpost sft`"):
        load_example_rows(data, "train")


def test_a_chat_template_of_ones_own_with_its_arguments() -> None:
    chat = MARKED.replace("<|im_start|>{{", "<|im_start|>{{ 'the ' if polite else '' }}{{")
    data = DataConfig(chat_template=chat, chat_template_kwargs={"polite": True})
    made, tokenizer = encode([{"talk": TALK}], chat=None, data=data, messages_key="talk")
    assert trained_on(made.examples[0], tokenizer) == "2<|im_end|>|The answer is four.<|im_end|>"
    assert "the user" in tokenizer.decode(made.examples[0].token_ids)


def test_the_digest_knows_tokens_masks_and_order() -> None:
    a, _ = encode([{"talk": TALK}, {"talk": TALK[:2]}], messages_key="talk")
    b, _ = encode([{"talk": TALK[:2]}, {"talk": TALK}], messages_key="talk")
    c, _ = encode([{"talk": TALK}, {"talk": TALK[:2]}], messages_key="talk", loss_on="all")
    again, _ = encode([{"talk": TALK}, {"talk": TALK[:2]}], messages_key="talk")
    digests = [digest_examples(made.examples) for made in (a, b, c)]
    assert len(set(digests)) == 3 and digest_examples(again.examples) == digests[0]

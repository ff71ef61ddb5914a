"""``data.format``: rows as other tools publish them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlpost.config import DataConfig, SourceConfig
from rlpost.errors import DataError
from rlpost.prompts.encoding import make_messages
from rlpost.prompts.formats import FORMATS
from rlpost.prompts.rows import look_up
from tests.data_rows import read_rows
from tests.prompts.test_conversion import CONTENTS, JSON, ROLES, texts_in


def converted(tmp_path, format, *rows):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(SourceConfig(path=str(tmp_path / "d.jsonl")), format=format)


USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        (
            "verl",
            {
                "data_source": "openai/gsm8k",
                "prompt": [USER],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"index": 0, "answer": "so 4"},
            },
            {
                "prompt": [USER],
                "answer": "4",
                "data_source": "openai/gsm8k",
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"index": 0, "answer": "so 4"},
            },
        ),
        (
            "verl",
            {"prompt": [USER], "reward_model": {"ground_truth": None}},
            {"prompt": [USER], "answer": None, "reward_model": {"ground_truth": None}},
        ),
        ("trl", {"prompt": "2+2?", "solution": "4"}, {"prompt": "2+2?", "answer": "4"}),
        ("trl", {"prompt": [USER], "completion": [ASSISTANT]}, {"prompt": [USER], "answer": "4"}),
        ("trl", {"prompt": "2+2?", "completion": "4"}, {"prompt": "2+2?", "answer": "4"}),
        ("trl", {"messages": [USER, ASSISTANT]}, {"prompt": [USER], "answer": "4"}),
        ("trl", {"prompt": "2+2?"}, {"prompt": "2+2?"}),
        ("trl", {"prompt": "2+2?", "answer": 4}, {"prompt": "2+2?", "answer": 4}),
        (
            "open_instruct",
            {"messages": [USER], "ground_truth": "4", "dataset": "gsm8k"},
            {"prompt": [USER], "answer": "4", "dataset": "gsm8k"},
        ),
        (
            "open_instruct",
            {"messages": [USER, ASSISTANT], "ground_truth": ["4", "four"]},
            {"prompt": [USER], "answer": ["4", "four"]},
        ),
        (
            "sharegpt",
            {
                "id": "x",
                "system": "Be brief.",
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "gpt", "value": "hello"},
                    {"from": "human", "value": "2+2?"},
                    {"from": "gpt", "value": "4", "weight": None},
                ],
            },
            {
                "id": "x",
                "prompt": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "hello"},
                    USER,
                ],
                "answer": "4",
            },
        ),
        (
            "alpaca",
            {"instruction": "Add.", "input": "2 and 2", "output": "4"},
            {"prompt": "Add.\n\n2 and 2", "answer": "4"},
        ),
        ("alpaca", {"instruction": "Add.", "input": "", "output": "4"}, {"prompt": "Add.", "answer": "4"}),
        ("alpaca", {"instruction": "Add.", "output": "4"}, {"prompt": "Add.", "answer": "4"}),
    ],
)
def test_rows_become_prompt_and_answer(tmp_path, format, row, expected):
    (made,) = converted(tmp_path, format, row)
    assert made == expected and made.origin.endswith("d.jsonl line 1")
    data = DataConfig()
    assert make_messages(made, data)[-1]["role"] == "user"
    if "answer" in expected:
        assert look_up(made, str(data.reference_key)) == expected["answer"]


@pytest.mark.parametrize(
    ("format", "row", "text"),
    [
        ("verl", {"prompt": [USER]}, "no column 'reward_model.ground_truth'; its columns are prompt"),
        ("verl", {"prompt": [USER], "answer": "5", "reward_model": {"ground_truth": "4"}}, "a column answer beside"),
        ("trl", {"question": "q"}, "no column 'prompt'"),
        ("trl", {"prompt": "q", "completion": [USER, ASSISTANT]}, "completion: got 2 messages"),
        ("trl", {"prompt": "q", "completion": 4}, "completion: got a number"),
        ("trl", {"messages": [ASSISTANT]}, "the assistant's turn alone"),
        (
            "trl",
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f"}]}]},
            "got tool calls; expected a turn that is text",
        ),
        ("open_instruct", {"messages": "q", "ground_truth": "4"}, "messages: got text"),
        ("open_instruct", {"messages": [USER]}, "no column 'ground_truth'"),
        ("open_instruct", {"messages": [USER], "prompt": "q", "ground_truth": "4"}, "a column prompt beside"),
        ("sharegpt", {"conversations": [{"role": "user", "content": "q"}]}, "turn 1: got no from and value"),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            "turn 1: got from 'function_call'",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q", "weight": 0}]},
            "weight, which",
        ),
        ("sharegpt", {"conversations": []}, "an empty list"),
        ("sharegpt", {"conversations": [{"from": ["human"], "value": "q"}]}, "turn 1: got a list as from"),
        (
            "sharegpt",
            {"system": "S", "conversations": [{"from": "system", "value": "T"}]},
            "a system turn beside the column system",
        ),
        ("trl", {"prompt": "q", "completion": [USER]}, "a message of user"),
        ("sharegpt", {"conversations": None}, "null"),
        ("alpaca", {"instruction": None, "output": "x"}, "instruction: got null"),
        ("alpaca", {"instruction": "i", "input": 3, "output": "x"}, "input: got a number"),
        ("alpaca", {"instruction": "i"}, "no column 'output'"),
    ],
)
def test_rows_of_another_shape_are_one_line(tmp_path, format, row, text):
    with pytest.raises(DataError) as caught:
        converted(tmp_path, format, {"a": 1} if row is None else row)
    assert text in str(caught.value) and "line 1" in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("format", FORMATS)
def test_rows_without_the_columns_are_refused(tmp_path, format):
    with pytest.raises(DataError, match="line 1: no column"):
        converted(tmp_path, format, {"text": "q"})


TURNS = st.lists(
    st.fixed_dictionaries({}, optional={"from": st.sampled_from(["human", "gpt", "tool"]) | JSON, "value": JSON})
    | st.fixed_dictionaries({}, optional={"role": ROLES, "content": CONTENTS, "name": JSON}),
    max_size=3,
)
COLUMNS = {
    **dict.fromkeys(("prompt", "messages", "conversations", "completion"), TURNS | st.text(max_size=5) | JSON),
    **dict.fromkeys(("instruction", "input", "output", "system"), st.text(max_size=5) | JSON),
    "reward_model": st.fixed_dictionaries({}, optional={"ground_truth": JSON}) | JSON,
    **dict.fromkeys(("solution", "ground_truth", "answer"), JSON),
}


@given(row=st.fixed_dictionaries({}, optional=COLUMNS), format=st.sampled_from(sorted(FORMATS)))
@settings(max_examples=300, deadline=None)
def test_any_row_in_any_format_ends_in_messages_or_in_one_line(tmp_path_factory, row, format):
    try:
        (made,) = converted(tmp_path_factory.getbasetemp(), format, row)
        messages = make_messages(made, DataConfig())
    except DataError as error:
        assert "line 1" in str(error) and str(error).isprintable()
        return
    given_texts = list(texts_in(row))
    for message in messages:
        for text in message["content"].split("\n"):
            assert any(text in one for one in given_texts), "a text that the row does not hold"

"""Conversations with tools: every call and every tool of a row is in the prompt, or the row is refused."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from rlpost.config import DataConfig, SFTConfig
from rlpost.errors import DataError
from rlpost.models.tokenizer import load_tokenizer
from rlpost.prompts.chat_template import ChatTemplate, read_chat_template
from rlpost.prompts.encoding import build_prompts, make_messages
from rlpost.prompts.messages import read_messages, read_tools
from rlpost.prompts.rows import Row
from rlpost.prompts.supervised import ExampleEncoder
from tests.tiny_models import CHATML, make_tokenizer, write_model

NOW = datetime(2026, 11, 30, 10, 0, 0)
# In the manner of Qwen's and Hermes': tools in the system turn as JSON, calls as JSON in the assistant's.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role + (' ' + m.name if m.name else '') }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments}"
    " | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = TOOLS.replace("\n{{ m.content }}", "\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}").replace(
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add",
    "{% endfor %}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}{% if add",
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
TALK = [
    {"role": "user", "content": "Is it cold?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "-3", "name": "weather", "tool_call_id": "c1"},
]
DONE = [*TALK, {"role": "assistant", "content": "Yes."}]
DATA = DataConfig(reference_key=None, tools_key="tools")


def calls_of(*calls):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": list(calls)}]
    return read_messages(talk, "row")[1].get("tool_calls")


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
        {"function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}, "id": None},
        {**CALL, "type": None, "index": None},
    ],
)
def test_a_call_has_one_form(call) -> None:
    assert calls_of(call, {**call, "id": "c2"}) == [CALL, {"id": "c2", **CALL}]


@pytest.mark.parametrize("nothing", [None, "", {}, "{}"])
def test_a_call_without_arguments_has_none(nothing) -> None:
    assert calls_of({"name": "now", "arguments": nothing})[0]["function"] == {"name": "now", "arguments": {}}
    assert calls_of({"name": "now"})[0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("calls", "got"),
    [
        ("weather", "tool_calls: got text; expected a list of calls"),
        ({"name": "f"}, "tool_calls: got a mapping"),
        (["f"], "call 1: got text; expected a function's name and its arguments"),
        ([{"arguments": {}}], "call 1: name: got null"),
        ([{"name": 3}], "call 1: name: got a number"),
        ([CALL, {"function": {"name": ""}}], "call 2: name: got empty text"),
        ([{"name": "f", "arguments": "{"}], "arguments: got text that is no JSON"),
        ([{"name": "f", "arguments": "[1]"}], "arguments: got a list; expected a mapping"),
        ([{"name": "f", "arguments": 3}], "arguments: got a number"),
        ([{"name": "f", "type": "retrieval"}], "type: got retrieval; expected function"),
        ([{"name": "f", "id": 7}], "id: got a number; expected text"),
        ([{"name": "f", "result": "x"}], "got result, which is not supported"),
        ([{"function": {"name": "f", "strict": True}}], "got strict, which is not supported"),
    ],
)
def test_what_is_no_call_is_refused(calls, got) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(DataError, match="^row: message 2") as caught:
        read_messages(talk, "row")
    assert got in str(caught.value) and "\n" not in str(caught.value)


def test_only_who_has_them_may_have_calls_names_and_ids() -> None:
    assert read_messages(DONE, "row")[2] == TALK[2]
    for message, got in (
        ({"role": "user", "content": "q", "tool_calls": [CALL]}, "tool_calls, which is not supported for user"),
        ({"role": "assistant", "content": "q", "name": "x"}, "name, which is not supported for assistant"),
        ({"role": "tool", "content": "1", "tool_call_id": 1}, "tool_call_id: got a number"),
        ({"role": "tool", "content": None}, "content: got null"),
        ({"role": "assistant", "tool_calls": []}, "got no content"),
    ):
        with pytest.raises(DataError) as caught:
            read_messages([message], "row")
        assert got in str(caught.value)


def test_tools_are_a_list_or_its_json_text() -> None:
    flat = {"name": "f", "description": "adds"}
    for tools in ([TOOL, flat], json.dumps([TOOL, flat])):
        assert read_tools({"tools": tools}, DATA) == [TOOL, flat]
    assert read_tools({"tools": [TOOL]}, DataConfig()) is None, "no column is named"
    assert [read_tools({"tools": nothing}, DATA) for nothing in (None, "", [])] == [None] * 3
    for tools, got in (
        ("weather", "text that is no JSON"),
        (3, "a number"),
        ({"name": "f"}, "a mapping; expected a list of tools"),
        (["f"], "tool 1: got text"),
        ([TOOL, {"function": {}}], "tool 2: got no name"),
    ):
        with pytest.raises(DataError, match=r"^d line 1: tools") as caught:
            read_tools(Row({"tools": tools}, "d line 1"), DATA)
        assert got in str(caught.value)
    with pytest.raises(DataError, match="no column 'tools'"):
        read_tools(Row({"prompt": "q"}, "d line 1"), DATA)


def test_tools_and_calls_are_in_the_prompt_as_transformers_renders_them(tmp_path) -> None:
    tokenizer = make_tokenizer(chat=TOOLS)
    folder = write_model(tmp_path, tokenizer=tokenizer)
    row = Row({"prompt": TALK, "tools": [TOOL]}, "d line 1")
    (prompt,) = build_prompts([row], DATA, load_tokenizer(str(folder)), max_prompt_tokens=None).prompts
    text = tokenizer.decode(prompt.token_ids)
    assert '"name": "weather", "parameters"' in text and text.endswith("-3<|im_end|>\n<|im_start|>assistant\n")
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}</tool_call>' in text
    template = read_chat_template(folder, DATA)
    assert template is not None
    messages, tools = make_messages(row, DATA), read_tools(row, DATA)
    assert template.render(messages, origin="d", started=NOW, tools=tools) == text


@pytest.mark.parametrize(
    ("chat", "row", "got"),
    [
        (None, {"prompt": TALK, "tools": None}, "tool_calls and no chat template"),
        (None, {"prompt": "q", "tools": [TOOL]}, "tools and no chat template"),
        (CHATML, {"prompt": TALK, "tools": None}, "tool_calls and a chat template that never reads them"),
        (CHATML, {"prompt": "q", "tools": [TOOL]}, "tools and a chat template that never reads them"),
        (TOOLS, {"prompt": TALK[:2], "tools": None}, "a prompt that ends with tool calls"),
    ],
)
def test_what_the_prompt_would_leave_out_is_refused(chat, row, got) -> None:
    with pytest.raises(DataError, match="^d line 1: got ") as caught:
        build_prompts([Row(row, "d line 1")], DATA, make_tokenizer(chat=chat), max_prompt_tokens=None)
    assert got in str(caught.value)


def test_with_tools_the_template_for_tools_is_taken(tmp_path) -> None:
    folder = write_model(tmp_path, tokenizer=make_tokenizer(chat=None))
    settings = folder / "tokenizer_config.json"
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": named}))
    for data, source in ((DATA, TOOLS), (DataConfig(), CHATML)):
        template = read_chat_template(folder, data)
        assert isinstance(template, ChatTemplate) and template.source == source


@pytest.mark.parametrize("chat", [TOOLS, MARKED], ids=["prefixes", "marks"])
def test_calls_are_trained_on_and_what_tools_answer_is_not(chat) -> None:
    tokenizer = make_tokenizer(chat=chat)
    sft = SFTConfig(messages_key="talk")
    encoder = ExampleEncoder(
        DATA, sft, tokenizer, stop_token_ids=[tokenizer.eos_token_id], max_tokens=None, started=NOW
    )
    (example,) = encoder.encode_rows([Row({"talk": DONE, "tools": [TOOL]}, "d line 1")], "data.train").examples
    trained = tokenizer.decode(example.token_ids[example.loss_mask])
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}</tool_call><|im_end|>'
    assert trained == f"{call}Yes.<|im_end|>"
    assert '"parameters"' in tokenizer.decode(example.token_ids)

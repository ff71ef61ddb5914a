"""Conversations: the messages of a row, their tool calls, and the tools they are given.

Calls are brought into the one form that chat templates are written for; tools are kept as they are. What cannot be read
is refused with the row and the message, and so is what a prompt would leave out. Called by whatever makes prompts or
examples of rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlpost.config import DataConfig
from rlpost.prompts.conversion import is_empty, kind_of, refuse
from rlpost.prompts.rows import look_up, origin_of

Message = dict[str, Any]
ASSISTANT = "assistant"
_BESIDE_CONTENT = {ASSISTANT: ("tool_calls",), "tool": ("tool_call_id", "name")}  # by role
CALL = "a function's name and its arguments"
MESSAGES = "text, or a list of chat messages, each with role and content"


def read_messages(value: Any, what: str) -> list[Message]:
    """The prompt column as chat messages: text is one message of the user, a list of messages is kept.

    A message has ``role`` and ``content``, both text; content may be a list of text parts, which are joined by line
    ends, and may be missing beside ``tool_calls`` of the assistant (:func:`read_calls`). A message of a tool may have
    ``tool_call_id`` and ``name``. Other keys must be empty. Raises DataError, with ``what`` and the message's number,
    for anything else.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        raise refuse(what, kind_of(value), MESSAGES, "set data.prompt_key, or fix the row")
    return [_read_message(message, f"{what}: message {n}") for n, message in enumerate(value, start=1)]


def _read_message(message: Any, what: str) -> Message:
    if not isinstance(message, Mapping):
        raise refuse(what, kind_of(message), MESSAGES, "fix the row")
    role = message.get("role")
    has_calls = role == ASSISTANT and not is_empty(message.get("tool_calls"))
    for key in ("role", "content"):
        if key not in message and not (key == "content" and has_calls):
            got = f"no {key} (its keys are {', '.join(map(str, message)) or 'none'})"
            raise refuse(what, got, "role and content", "rename the keys")
    if not isinstance(role, str) or not role:
        raise refuse(f"{what}: role", kind_of(role), "text such as user", "fix the row")
    own = _BESIDE_CONTENT.get(role, ())
    for key, value in message.items():
        if key not in ("role", "content", *own) and not is_empty(value):
            do = "leave the key out, or write it into the content as text"
            raise refuse(what, f"{key}, which is not supported for {role}", "role and content", do)
    content = message.get("content")
    if has_calls and content is None:
        content = ""
    read: Message = {"role": role, "content": _read_content(content, f"{what} ({role}): content")}
    for key in own:
        value = message.get(key)
        if is_empty(value):
            continue
        if key == "tool_calls":
            value = read_calls(value, f"{what}: {key}")
        elif not isinstance(value, str):
            raise refuse(f"{what}: {key}", kind_of(value), "text", "fix the row")
        read[key] = value
    return read


def _read_content(content: Any, what: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        raise refuse(what, kind_of(content), "text, or a list of text parts", "fix the row")
    return "\n".join(_read_part(part, f"{what} part {n}") for n, part in enumerate(content, start=1))


def _read_part(part: Any, what: str) -> str:
    got = None
    if not isinstance(part, Mapping):
        got = kind_of(part)
    elif part.get("type") != "text":
        kind = part.get("type")
        got = f"type {kind if isinstance(kind, str) else kind_of(kind)}"
    elif not isinstance(part.get("text"), str):
        got = f"{kind_of(part.get('text'))} as text"
    else:
        full = [key for key, value in part.items() if key not in ("type", "text") and not is_empty(value)]
        if not full:
            return str(part["text"])
        got = f"{full[0]} in it"
    raise refuse(what, got, "type text and a text: prompts are text only", "leave the part out, or write it as text")


# -- tools ---------------------------------------------------------------------------------------------------------


def read_calls(calls: Any, what: str) -> list[dict[str, Any]]:
    """``tool_calls`` of a message, each as ``{"type": "function", "function": {"name", "arguments"}}`` with its ``id``.

    Name and arguments may also stand in the call itself. Arguments are a mapping, or the JSON text of one, as APIs
    send it: templates would write such text in quotes. Raises DataError, with ``what``, for anything else.
    """
    if not isinstance(calls, Sequence) or isinstance(calls, str | bytes):
        raise refuse(what, kind_of(calls), "a list of calls", "fix the row")
    return [_read_call(call, f"{what}: call {n}") for n, call in enumerate(calls, start=1)]


def _read_call(call: Any, what: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise refuse(what, kind_of(call), CALL, "fix the row")
    if not is_empty(call.get("type")) and call["type"] != "function":
        raise refuse(f"{what}: type", str(call["type"]), "function", "fix the row")
    is_nested = isinstance(call.get("function"), Mapping)
    function: Mapping[str, Any] = call["function"] if is_nested else call
    known = {"id", "type", "function"} if is_nested else {"id", "type", "name", "arguments"}
    others = [key for key, value in call.items() if key not in known and not is_empty(value)]
    others += [key for key, value in function.items() if is_nested and key not in ("name", "arguments") and value]
    if others:
        raise refuse(what, f"{others[0]}, which is not supported", CALL, "leave the key out")
    name, call_id = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name:
        raise refuse(f"{what}: name", kind_of(name), "text", "fix the row")
    if not is_empty(call_id) and not isinstance(call_id, str):
        raise refuse(f"{what}: id", kind_of(call_id), "text", "fix the row")
    arguments = _read_arguments(function.get("arguments"), f"{what}: arguments")
    read = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call_id, **read} if call_id else read


def _read_arguments(arguments: Any, what: str) -> dict[str, Any]:
    if is_empty(arguments):
        return {}
    if isinstance(arguments, str):
        arguments = _parse(arguments, what, "a mapping, or the JSON text of one")
    if not isinstance(arguments, Mapping):
        raise refuse(what, kind_of(arguments), "a mapping, or the JSON text of one", "fix the row")
    return dict(arguments)


def read_tools(row: Mapping[str, Any], data: DataConfig) -> list[dict[str, Any]] | None:
    """What ``data.tools_key`` names: a list of tools, or the JSON text of one; None where the row has none.

    A tool is a mapping with ``name``, in it or in its ``function``. Raises DataError with the row for anything else.
    """
    if data.tools_key is None:
        return None
    what, expected = f"{origin_of(row)}: {data.tools_key}", "a list of tools, or the JSON text of one"
    tools = look_up(row, data.tools_key)
    if is_empty(tools):
        return None
    if isinstance(tools, str):
        tools = _parse(tools, what, expected)
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise refuse(what, kind_of(tools), expected, "set data.tools_key, or fix the row")
    for number, tool in enumerate(tools, start=1):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            got = kind_of(tool) if inner is None else "no name"
            raise refuse(f"{what}: tool {number}", got, "a mapping with a name", "fix the row")
    return [dict(tool) for tool in tools] or None


def require_in_prompt(
    template: str | None, messages: Sequence[Mapping[str, Any]], tools: Any, origin: str, *, ends: bool = False
) -> None:
    """Raises DataError where the text would leave tools or calls out: it is plain text (``template`` is None), its
    template never reads them, or they would have to be continued. ``ends``: the conversation ends with its last
    message; a prompt's is continued if it is the assistant's."""
    used = {"tools": bool(tools), "tool_calls": any(message.get("tool_calls") for message in messages)}
    for name in [name for name, is_used in used.items() if is_used]:
        if template is None or not re.search(rf"\b{name}\b", template):
            got = f"{name} and {'no chat template' if template is None else 'a chat template that never reads them'}"
            do = "set data.chat_template to one with tools, or take them out of the row"
            raise refuse(origin, got, "a chat template that shows them", do)
    if not ends and messages[-1].get("tool_calls"):
        raise refuse(
            origin, "a prompt that ends with tool calls", "what the tools answered", "add it, or end before them"
        )


def _parse(text: str, what: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise refuse(what, "text that is no JSON", expected, "fix the row") from None

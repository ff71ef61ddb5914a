"""``data.format``: rows as other tools publish them, converted to ``prompt`` and ``answer``.

Each format is one function and one line in :data:`FORMATS`. It is chosen by name, never guessed from the columns, and a
row that does not have its columns is refused. The columns that are converted are replaced by the two; all others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlpost.prompts.conversion import is_empty, kind_of, refuse
from rlpost.prompts.messages import read_messages
from rlpost.prompts.rows import Row, Rows, look_up

NO_ANSWER = object()  # null in the data is an answer of null
Converted = tuple[Any, Any, tuple[str, ...]]  # prompt, answer or NO_ANSWER, columns that are replaced

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt"), "assistant"),
    "system": "system",
}


def convert(rows: Rows, format: str) -> Rows:
    """``rows`` with the columns ``prompt`` and ``answer``. Raises DataError, when a row is read, that names it."""
    if format == "columns":
        return rows
    read = FORMATS[format]

    def change(row: Row) -> Row:
        prompt, answer, replaced = read(row)
        others = {name: value for name, value in row.items() if name not in replaced}
        for name in ("prompt", "answer"):
            if name in others:
                do = "rename or remove the column, or use data.format=columns"
                raise refuse(row.origin, f"a column {name} beside those of {format}", "none of this name", do)
        return Row({"prompt": prompt, **({} if answer is NO_ANSWER else {"answer": answer}), **others}, row.origin)

    return rows.map(change)


def _alpaca(row: Row) -> Converted:
    """Stanford Alpaca: instruction, input (may be empty), output."""
    instruction, given = _text(row, "instruction"), _text(row, "input") if row.get("input") is not None else ""
    prompt = f"{instruction}\n\n{given}" if given else instruction
    return prompt, _text(row, "output"), ("instruction", "input", "output")


def _sharegpt(row: Row) -> Converted:
    """ShareGPT: conversations, each turn with ``from`` and ``value``; a column ``system`` may stand beside it."""
    turns = look_up(row, "conversations")
    if not isinstance(turns, list) or not turns:
        raise refuse(f"{row.origin}: conversations", kind_of(turns), "a list of turns", "fix the row")
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": _text(row, "system")})
    for number, turn in enumerate(turns, start=1):
        what = f"{row.origin}: conversations: turn {number}"
        if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
            do = "fix it, or use data.format=columns with data.prompt_key"
            raise refuse(what, "no from and value", "a mapping with from and value", do)
        others = [str(name) for name in turn if name not in ("from", "value") and not is_empty(turn[name])]
        if others:
            raise refuse(what, f"{', '.join(others)}, which is not supported", "from and value only", "leave it out")
        role = turn["from"]
        if not isinstance(role, str) or role not in SHAREGPT_ROLES:
            got = f"from {role!r}" if isinstance(role, str) else f"{kind_of(role)} as from"
            do = "leave the row out, or write the conversation as messages"
            raise refuse(what, got, f"one of {', '.join(SHAREGPT_ROLES)}", do)
        if SHAREGPT_ROLES[role] == "system" and row.get("system"):
            raise refuse(what, "a system turn beside the column system", "one of the two", "take one of them out")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    prompt, answer = _split(messages, f"{row.origin}: conversations")
    return prompt, answer, ("conversations", "system")


def _trl(row: Row) -> Converted:
    """TRL's dataset types: prompt, with solution or completion beside it or alone; or messages."""
    if "messages" in row:
        return (*_split(look_up(row, "messages"), f"{row.origin}: messages"), ("messages",))
    prompt = look_up(row, "prompt")
    if "solution" in row:
        return prompt, row["solution"], ("prompt", "solution")
    if "completion" in row:
        return prompt, _content(row["completion"], f"{row.origin}: completion"), ("prompt", "completion")
    return prompt, row.get("answer", NO_ANSWER), ("prompt", "answer")


def _open_instruct(row: Row) -> Converted:
    """open-instruct's data for verifiable rewards: messages and ground_truth."""
    prompt, _ = _split(look_up(row, "messages"), f"{row.origin}: messages")
    return prompt, look_up(row, "ground_truth"), ("messages", "ground_truth")


def _verl(row: Row) -> Converted:
    """verl: prompt as messages, reward_model.ground_truth."""
    return look_up(row, "prompt"), look_up(row, "reward_model.ground_truth"), ("prompt",)


FORMATS: Mapping[str, Callable[[Row], Converted]] = {
    "alpaca": _alpaca,
    "open_instruct": _open_instruct,
    "sharegpt": _sharegpt,
    "trl": _trl,
    "verl": _verl,
}


def _split(messages: Any, what: str) -> tuple[Any, Any]:
    """A conversation as the messages before the assistant's last turn, and that turn's content, if it has one."""
    if not isinstance(messages, list) or not messages:
        raise refuse(what, kind_of(messages), "a list of messages", "fix the row")
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return messages, NO_ANSWER
    if len(messages) == 1:
        raise refuse(what, "the assistant's turn alone", "a question before it", "fix the row")
    return messages[:-1], _content([last], f"{what}: the last turn")


def _content(completion: Any, what: str) -> str:
    """The text of a completion: text, or one message of the assistant's."""
    if isinstance(completion, list) and len(completion) != 1:
        raise refuse(what, f"{len(completion)} messages", "text, or one message of the assistant's", "fix the row")
    message = read_messages(completion, what)[0]
    if message.get("tool_calls"):
        do = "leave the row out; for rlpost sft, use data.format=columns and sft.messages_key"
        raise refuse(what, "tool calls", "a turn that is text, to compare with", do)
    if isinstance(completion, list) and message["role"] != "assistant":
        raise refuse(what, f"a message of {message['role']}", "text, or one message of the assistant's", "fix the row")
    return message["content"]


def _text(row: Row, column: str) -> str:
    value = look_up(row, column)
    if not isinstance(value, str):
        raise refuse(f"{row.origin}: {column}", kind_of(value), "text", "fix the row")
    return value

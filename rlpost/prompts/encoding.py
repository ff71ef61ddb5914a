"""Rows to encoded prompts: the template (or the tokenizer's chat template) around the question, then token ids.

Called by ``session``; ``preflight`` uses the parts that need no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlpost.config import DataConfig
from rlpost.errors import ConfigError, DataError, explain
from rlpost.prompts.rows import Row, look_up, origin_of
from rlpost.types import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Every prompt of a source, in the source's order; ``uid`` is empty until the prompt is drawn."""

    prompts: tuple[Prompt, ...]
    num_dropped: int  # longer than the limit, with data.long_prompts=drop


def build_prompts(rows: Sequence[Row], data: DataConfig, tokenizer: Any, *, max_prompt_tokens: int | None) -> PromptSet:
    """Encodes every row, with the chat template if ``data.chat`` allows it and the tokenizer has one.

    Args:
        tokenizer: anything with ``encode(text)`` and, for chat, ``chat_template`` and ``apply_chat_template``.
        max_prompt_tokens: the longest prompt allowed, tokens; None: any.

    Raises DataError for a missing column, a question that is not text, an empty prompt, a prompt that is too long
    (unless ``data.long_prompts`` is drop), and if nothing is left.
    """
    chat = uses_chat(data, tokenizer)
    prompts: list[Prompt] = []
    num_dropped = 0
    for row in rows:
        messages = make_messages(row, data)
        token_ids = _encode_chat(tokenizer, messages) if chat else tokenizer.encode(join_messages(messages))
        if not len(token_ids):
            raise DataError(f"{origin_of(row)}: the prompt has no tokens; expected at least one; check data.template")
        if max_prompt_tokens is not None and len(token_ids) > max_prompt_tokens:
            if data.long_prompts != "drop":
                raise DataError(describe_long(row, len(token_ids), max_prompt_tokens))
            num_dropped += 1
            continue
        prompts.append(_make_prompt(row, data, token_ids, messages))
    if not prompts:
        raise DataError(f"data: all {num_dropped} prompts are longer than {max_prompt_tokens} tokens; raise the limit")
    return PromptSet(prompts=tuple(prompts), num_dropped=num_dropped)


def uses_chat(data: DataConfig, tokenizer: Any) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if data.chat == "always" and not has_template:
        raise ConfigError(explain("data.chat", "always", "a tokenizer with a chat template", "use data.chat=never"))
    return has_template and data.chat != "never"


def make_messages(row: Mapping[str, Any], data: DataConfig) -> list[dict[str, str]]:
    """Chat messages of a row: the system prompt, if any, then the question with ``data.template`` around it.

    A column that already holds messages (``[{role, content}, ...]``) is kept; the template is applied to the last one.
    """
    question = look_up(row, data.prompt_key)
    if isinstance(question, str):
        messages = [{"role": "user", "content": question}]
    elif _are_messages(question):
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in question]
    else:
        got = type(question).__name__
        raise DataError(f"{origin_of(row)}: {data.prompt_key} is {got}; expected text or a list of chat messages")
    messages[-1]["content"] = _fill_template(data.template, row, messages[-1]["content"])
    if data.system_prompt:
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    return messages


def join_messages(messages: Sequence[Mapping[str, str]]) -> str:
    """The text of a prompt if no chat template is used: the contents, one after the other."""
    return "\n\n".join(message["content"] for message in messages)


def describe_long(row: Mapping[str, Any], got: int, limit: int) -> str:
    do = "set data.long_prompts=drop, or raise data.max_prompt_tokens or model.max_context_tokens"
    return f"{origin_of(row)}: the prompt has {got} tokens; expected at most {limit}; {do}"


def _encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> Sequence[int]:
    # Text first, then plain encoding without the special tokens that the template already wrote.
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


def _make_prompt(row: Row, data: DataConfig, token_ids: Sequence[int], messages: Sequence[Mapping[str, str]]) -> Prompt:
    reference = None if data.reference_key is None else look_up(row, data.reference_key)
    return Prompt(
        uid="",
        token_ids=np.asarray(token_ids, dtype=np.int32),
        text=join_messages(messages),
        reference=reference,
        columns={name: value for name, value in row.items() if name not in (data.prompt_key, data.reference_key)},
    )


def _fill_template(template: str, row: Mapping[str, Any], question: str) -> str:
    try:
        return template.format_map({**row, "prompt": question})
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        columns = ", ".join(["prompt", *(str(name) for name in row if name != "prompt")])
        do = "double other braces, as in \\boxed{{}}"
        message = f"data.template: {error!r} in {template!r}; expected columns ({columns}) in braces; {do}"
        raise ConfigError(message) from None


def _are_messages(value: Any) -> bool:
    if not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value)

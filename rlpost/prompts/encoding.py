"""Rows to encoded prompts: the template (or the tokenizer's chat template) around the question, then token ids.

What the values of a row may be is ``prompts.conversion``'s to say. Called by ``session`` and ``sft``; ``preflight``
uses the parts that need no tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, overload

import numpy as np

from rlpost.config import DataConfig
from rlpost.errors import ConfigError, DataError
from rlpost.prompts.chat_template import choose_template, explain_failure
from rlpost.prompts.conversion import TemplateFormatter, describe_reference, is_reference, refuse
from rlpost.prompts.messages import ASSISTANT, Message, read_messages, read_tools, require_in_prompt
from rlpost.prompts.rows import Row, Rows, look_up, origin_of
from rlpost.types import Prompt

KEPT_PROMPTS = 100_000  # of a larger source, each prompt is encoded again when it is drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Every prompt of a source, in the source's order; ``uid`` is empty until the prompt is drawn."""

    prompts: Sequence[Prompt]
    num_dropped: int  # longer than the limit, with data.long_prompts=drop
    digest: str = ""  # of the prompts' tokens, references and order: a resume refuses other data
    max_tokens: int = 0  # of the longest prompt
    fingerprints: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # i64[prompts], of their tokens
    bad_reference: str = ""  # the message about the first row whose reference no reward can compare with
    name: str = ""  # of the source; "" where it is the only one
    weight: float = 1.0  # share of the draws, before normalization


class EncodedPrompts(Sequence[Prompt]):
    """Prompts that are made from their rows each time they are asked for."""

    def __init__(self, rows: Rows, make: Callable[[Row], Prompt]) -> None:
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> EncodedPrompts: ...

    def __getitem__(self, index: int | slice) -> Prompt | EncodedPrompts:
        if isinstance(index, slice):
            return EncodedPrompts(self._rows[index], self._make)
        return self._make(self._rows[index])


def build_prompts(
    rows: Rows,
    data: DataConfig,
    tokenizer: Any,
    *,
    max_prompt_tokens: int | None,
    started: datetime | None = None,
    name: str = "",
    weight: float | None = None,
) -> PromptSet:
    """Encodes every row, with the chat template if ``data.chat`` allows it and there is one.

    Args:
        tokenizer: anything with ``encode(text)`` and, for chat, ``chat_template`` and ``apply_chat_template``.
        max_prompt_tokens: the longest prompt allowed, tokens; None: any.
        started: the time that a chat template is given where it reads the clock; None: now.
        name, weight: of the source; None: the number of its prompts.

    Raises DataError for a missing column, a question that is not text, an empty prompt, a prompt that is too long
    (unless ``data.long_prompts`` is drop), and if nothing is left; ConfigError or ModelError for a chat template that
    cannot be used.
    """
    encoder = PromptEncoder(data, tokenizer, started or datetime.now())

    def make(row: Row) -> Prompt:
        messages = make_messages(row, data)
        text = encoder.render(messages, origin_of(row), read_tools(row, data))
        token_ids = encoder.encode(text)
        if not len(token_ids):
            raise DataError(describe_empty(row))
        return _make_prompt(row, data, token_ids, join_messages(messages) if encoder.is_chat else text)

    chosen, fingerprints, prompts, max_tokens, bad = [], [], [], 0, ""
    digest = hashlib.blake2b(digest_size=8)
    for index, row in enumerate(rows):
        prompt = make(row)
        bad = bad or find_bad_reference(row, data)
        num_tokens = len(prompt.token_ids)
        if max_prompt_tokens is not None and num_tokens > max_prompt_tokens:
            if data.long_prompts != "drop":
                raise DataError(describe_long(row, num_tokens, max_prompt_tokens))
            continue
        chosen.append(index)
        max_tokens = max(max_tokens, num_tokens)
        fingerprints.append(fingerprint(prompt))
        digest.update(prompt.token_ids.tobytes() + repr(prompt.reference).encode("utf-8", "surrogatepass") + b"\0")
        if len(rows) <= KEPT_PROMPTS:
            prompts.append(prompt)
    num_dropped = len(rows) - len(chosen)
    if not chosen:
        raise DataError(f"data: all {num_dropped} prompts are longer than {max_prompt_tokens} tokens; raise the limit")
    return PromptSet(
        prompts=prompts or EncodedPrompts(rows.choose(np.array(chosen, np.int64)), make),
        num_dropped=num_dropped,
        digest=digest.hexdigest(),
        max_tokens=max_tokens,
        fingerprints=np.array(fingerprints, np.int64),
        bad_reference=bad,
        name=name,
        weight=len(chosen) if weight is None else weight,
    )


def fingerprint(prompt: Prompt) -> int:
    """Equal for equal tokens, within this process."""
    return hash(prompt.token_ids.tobytes())


class PromptEncoder:
    """Messages to a prompt's text and its tokens: by the chat template, or as plain text where there is none."""

    def __init__(self, data: DataConfig, tokenizer: Any, started: datetime) -> None:
        """See :func:`build_prompts`. Raises ConfigError or ModelError for a template that cannot be used."""
        template = choose_template(data, getattr(tokenizer, "chat_template", None))
        self.is_chat = template is not None
        self._data, self._tokenizer = data, tokenizer
        self._options = {} if template is None else {"chat_template": template.source, **template.options(started)}
        self._encode_plain = None if self.is_chat else make_encode(tokenizer)

    def render(self, messages: Sequence[Message], origin: str, tools: Sequence[Message] | None = None) -> str:
        """The whole text, up to where the response begins. Raises DataError, with ``origin``, where that fails."""
        require_in_prompt(self._options.get("chat_template"), messages, tools, origin)
        text = self._apply_template(messages, origin, tools) if self.is_chat else join_messages(messages)
        return add_prefill(text, self._data, origin, is_chat=self.is_chat)

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of :meth:`render`'s text, encoded as one string."""
        if self._encode_plain is not None:
            return self._encode_plain(text)
        # The special tokens of a template are in its text.
        token_ids: Sequence[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    def _apply_template(self, messages: Sequence[Message], origin: str, tools: Sequence[Message] | None) -> str:
        is_open = ends_with_assistant(messages)
        options: dict[str, Any] = {"continue_final_message": True} if is_open else {}
        if tools:
            options["tools"] = tools
        try:
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=not is_open, tokenize=False, **options, **self._options
            )
        except Exception as error:  # a template raises what it likes, in a sandbox
            raise explain_failure(error, origin, messages) from error
        return str(text)


def make_messages(row: Mapping[str, Any], data: DataConfig) -> list[Message]:
    """Chat messages of a row: the system prompt, if any, then the question with ``data.template`` around it.

    A column that already holds messages (``[{role, content}, ...]``) is kept; the template is applied to the user's
    last one (to the last one, if none is the user's). Raises DataError for content that is not text, for a second
    system message, and for a second beginning of the response.
    """
    origin = origin_of(row)
    messages = read_messages(look_up(row, data.prompt_key), f"{origin}: {data.prompt_key}")
    question = next((m for m in reversed(messages) if m["role"] == "user"), messages[-1])
    question["content"] = _fill_template(data.template, row, question["content"])
    if data.prefill and ends_with_assistant(messages):
        do = "set data.prefill=null, or take the message out of the row"
        raise refuse(origin, "a last message of the assistant beside data.prefill", "one of the two", do)
    if data.system_prompt:
        if any(message["role"] == "system" for message in messages):
            do = "set data.system_prompt=null, or take it out of the row"
            raise refuse(origin, "a system message beside data.system_prompt", "one of the two", do)
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    return messages


def ends_with_assistant(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the conversation ends in the assistant's words, which the response continues."""
    return messages[-1]["role"] == ASSISTANT


def add_prefill(text: str, data: DataConfig, origin: str, *, is_chat: bool) -> str:
    """``text`` with ``data.prefill`` behind it.

    Raises DataError where a chat template has begun the response in the same way: twice ``<think>`` is never meant.
    """
    if not data.prefill:
        return text
    words = data.prefill.strip()
    if is_chat and words and text.rstrip().endswith(words):
        do = "set data.prefill=null"
        raise refuse(origin, f"a chat template that ends with data.prefill, {words!r}", "it once", do)
    return text + data.prefill


def find_bad_reference(row: Mapping[str, Any], data: DataConfig) -> str:
    """A line about a reference that no reward can compare with; "" where it is usable or there is to be none."""
    if data.reference_key is None:
        return ""
    reference = look_up(row, data.reference_key)
    if is_reference(reference):
        return ""
    got = describe_reference(reference)
    do = "fill it in, leave the row out, or set data.reference_key=null for a reward that needs none"
    return str(refuse(f"{origin_of(row)}: {data.reference_key}", got, "a reference for the reward", do))


def make_encode(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """Encodes a text that is to be continued: without what the tokenizer appends."""
    appended = count_appended(tokenizer.encode)

    def encode(text: str) -> Sequence[int]:
        token_ids: Sequence[int] = tokenizer.encode(text)
        return token_ids[: len(token_ids) - appended]

    return encode


def count_appended(encode: Callable[..., Sequence[int]]) -> int:
    """How many tokens a tokenizer adds behind a text, such as its end token; a prompt must not end so.

    ``encode(text, add_special_tokens=...)`` gives token ids.
    """
    whole, own = list(encode("a", add_special_tokens=True)), list(encode("a", add_special_tokens=False))
    for start in range(len(whole) - len(own) + 1):
        if own and whole[start : start + len(own)] == own:
            return len(whole) - start - len(own)
    return 0


def join_messages(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a prompt if no chat template is used: the contents, one after the other."""
    return "\n\n".join(str(message["content"]) for message in messages)


def describe_empty(row: Mapping[str, Any]) -> str:
    return f"{origin_of(row)}: the prompt has no tokens; expected at least one; fix the row, or data.template"


def describe_long(row: Mapping[str, Any], got: int, limit: int) -> str:
    do = "set data.long_prompts=drop, or raise data.max_prompt_tokens or model.max_context_tokens"
    return f"{origin_of(row)}: the prompt has {got} tokens; expected at most {limit}; {do}"


def _make_prompt(row: Row, data: DataConfig, token_ids: Sequence[int], text: str) -> Prompt:
    reference = None if data.reference_key is None else look_up(row, data.reference_key)
    return Prompt(
        uid="",
        token_ids=np.asarray(token_ids, dtype=np.int32),
        text=text,
        reference=reference,
        columns={name: value for name, value in row.items() if name not in (data.prompt_key, data.reference_key)},
    )


def _fill_template(template: str, row: Mapping[str, Any], question: str) -> str:
    formatter = TemplateFormatter(f"{origin_of(row)}: data.template")
    try:
        return formatter.vformat(template, (), {**row, "prompt": question})
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        columns = ", ".join(["prompt", *(str(name) for name in row if name != "prompt")])
        do = "double other braces, as in \\boxed{{}}"
        message = f"data.template: {error!r} in {template!r}; expected columns ({columns}) in braces; {do}"
        raise ConfigError(f"{origin_of(row)}: {message}" if isinstance(row, Row) else message) from None

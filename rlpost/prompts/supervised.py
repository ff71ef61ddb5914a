"""Rows to examples for supervised training: tokens, and which of them are trained on.

A row holds a prompt and a response, or a whole conversation. The tokens of the assistant's turns are found by the chat
template's own marks (``{% generation %}``) or, where it has none, by rendering the conversation up to each turn and
through it. What cannot be told apart with certainty is refused with the row; nothing is guessed and nothing is cut.
Called by ``sft``; ``preflight`` reads the conversations, which needs no tokenizer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np

from rlpost.config import DataConfig, SFTConfig
from rlpost.errors import ConfigError, DataError, explain
from rlpost.prompts.chat_template import choose_template, explain_failure
from rlpost.prompts.conversion import kind_of, refuse
from rlpost.prompts.encoding import ends_with_assistant, join_messages, make_encode, make_messages
from rlpost.prompts.messages import ASSISTANT, Message, read_tools, require_in_prompt
from rlpost.prompts.rows import Row, Rows, chain, look_up, origin_of
from rlpost.prompts.sources import Source, list_sources

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for them


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sequence to train on. n: its tokens."""

    token_ids: np.ndarray  # i32[n]
    loss_mask: np.ndarray  # bool[n]; False at position 0, which nothing predicts


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleSet:
    """Every example of a source, in the source's order."""

    examples: tuple[Example, ...]
    num_dropped: int  # longer than the limit, with sft.long_examples=drop


def digest_examples(examples: Sequence[Example]) -> str:
    """A short digest of the examples' tokens, masks and order."""
    digest = hashlib.blake2b(digest_size=8)
    for example in examples:
        digest.update(digest_example(example))
    return digest.hexdigest()


def digest_example(example: Example) -> bytes:
    tokens = example.token_ids.astype(np.int32).tobytes()
    return hashlib.blake2b(tokens + b"\0" + example.loss_mask.tobytes(), digest_size=8).digest()


# -- sources ---------------------------------------------------------------------------------------------------------


def list_example_sources(data: DataConfig, split: str) -> list[Source]:
    """The sources of ``data.train`` or ``data.eval``, whose rows are examples, one source after the other.

    Raises ConfigError for weights: each epoch holds every row once.
    """
    sources = list_sources(data, split)
    for source in sources:
        if source.weight is not None:
            do = "take the weights out; data.train.sources.NAME.limit makes a source smaller"
            raise ConfigError(explain(f"{source.key}.weight", source.weight, "none with `rlpost sft`", do))
    return sources


def load_example_rows(data: DataConfig, split: str) -> Rows:
    return chain([source.load(data.prompt_key) for source in list_example_sources(data, split)])


# -- rows to conversations -----------------------------------------------------------------------------------------


def read_conversation(row: Mapping[str, Any], data: DataConfig, sft: SFTConfig) -> list[Message]:
    """The messages of a row; with prompt and response, the last one is the response.

    ``sft.messages_key`` names a column that holds the whole conversation, which is taken as it is, after
    ``data.system_prompt``. Without it, the prompt is made as for RL and the response is text in ``sft.response_key``.
    Raises DataError with the row for anything else.
    """
    origin = origin_of(row)
    if sft.messages_key is not None:
        value = _column(row, sft.messages_key, "sft.messages_key")
        if isinstance(value, str):
            do = "set sft.messages_key=null for rows with prompt and response"
            raise refuse(f"{origin}: {sft.messages_key}", "text", "a list of chat messages", do)
        messages = make_messages(row, replace(data, prompt_key=sft.messages_key, template="{prompt}"))
        if not any(message["role"] == ASSISTANT for message in messages):
            roles = ", ".join(message["role"] for message in messages)
            raise refuse(f"{origin}: {sft.messages_key}", f"only {roles}", "a message of the assistant", "fix the row")
        return messages
    messages = make_messages(row, data)
    if ends_with_assistant(messages):
        do = f"set sft.messages_key={data.prompt_key} if the column holds whole conversations"
        raise refuse(f"{origin}: {data.prompt_key}", "a prompt that ends with the assistant's words", "a prompt", do)
    key = sft.response_key or ("response" if data.format == "columns" else "answer")
    response = _column(row, key, "sft.response_key")
    if not isinstance(response, str):
        raise refuse(f"{origin}: {key}", kind_of(response), "the response as text", "fix the row")
    return [*messages, {"role": ASSISTANT, "content": response}]


def _column(row: Mapping[str, Any], key: str, named_by: str) -> Any:
    try:
        return look_up(row, key)
    except DataError:
        columns = ", ".join(map(str, row)) or "none"
        do = f"set {named_by}, or sft.messages_key for conversations" if "response" in named_by else f"set {named_by}"
        raise DataError(f"{origin_of(row)}: no column {key!r}; its columns are {columns}; {do}") from None


# -- conversations to tokens ---------------------------------------------------------------------------------------


class ExampleEncoder:
    """Makes examples of rows, and of the plain texts of lessons.

    Args:
        tokenizer: of transformers, with an end token.
        stop_token_ids: the tokens that end a response when the model generates.
        max_tokens: the longest example allowed; None: any.
        started: the time that a chat template is given where it reads the clock.
    """

    def __init__(
        self,
        data: DataConfig,
        sft: SFTConfig,
        tokenizer: Any,
        *,
        stop_token_ids: Collection[int],
        max_tokens: int | None,
        started: datetime,
    ) -> None:
        self._data, self._sft, self._tokenizer = data, sft, tokenizer
        self._stop, self._max_tokens = frozenset(stop_token_ids), max_tokens
        self._encode_open = make_encode(tokenizer)
        template = choose_template(data, getattr(tokenizer, "chat_template", None))
        self._is_chat = template is not None
        self._options = {} if template is None else {"chat_template": template.source, **template.options(started)}
        self._is_marked = template is not None and MARKS.search(template.source) is not None
        self.num_dropped = 0

    def encode_rows(self, rows: Rows, key: str) -> ExampleSet:
        """Raises DataError for the first row that cannot be used, and where none is left."""
        dropped_before = self.num_dropped
        encode = self._encode_chat if self._is_chat else self._encode_plain
        examples = [
            example
            for row in rows
            if (example := self._admit(encode(row), origin_of(row))) is not None  # None: too long, and counted
        ]
        if not examples:
            raise DataError(
                f"{key}: all {len(rows)} examples are longer than {self._max_tokens} tokens; raise the limit"
            )
        return ExampleSet(examples=tuple(examples), num_dropped=self.num_dropped - dropped_before)

    def encode_texts(self, prompt: str, response: str, origin: str) -> Example | None:
        """A lesson: both texts as they are and the end token. None: it is too long, and counted."""
        return self._admit(self._join(prompt, response, origin), origin)

    # ---- private --------------------------------------------------------------------------------------------

    def _admit(self, example: Example, origin: str) -> Example | None:
        length, limit = len(example.token_ids), self._max_tokens
        if limit is not None and length > limit:
            if self._sft.long_examples == "error":
                do = "set sft.long_examples=drop, or raise sft.max_example_tokens or model.max_context_tokens"
                raise DataError(f"{origin}: the example has {length} tokens; expected at most {limit}; {do}")
            self.num_dropped += 1
            return None
        if not example.loss_mask.any():
            raise refuse(origin, "no token to train on", "a response with at least one", "fix the row")
        return example

    def _encode_plain(self, row: Row) -> Example:
        messages = read_conversation(row, self._data, self._sft)
        if self._sft.messages_key is not None:
            do = "use a model with a chat template, or rows with prompt and response"
            raise refuse(origin_of(row), "a conversation", "a tokenizer with a chat template that may be used", do)
        require_in_prompt(None, messages, read_tools(row, self._data), origin_of(row), ends=True)
        return self._join(join_messages(messages[:-1]), messages[-1]["content"], origin_of(row))

    def _join(self, prompt: str, response: str, origin: str) -> Example:
        before = np.asarray(self._encode_open(prompt), np.int32)
        if not len(before):
            raise refuse(origin, "a prompt without tokens", "at least one", "fix the row, or data.template")
        words = self._tokenizer.encode(response, add_special_tokens=False)
        after = np.asarray([*words, self._tokenizer.eos_token_id], np.int32)
        trained = np.concatenate([np.full(len(before), self._sft.loss_on == "all"), np.ones(len(after), np.bool_)])
        return _make_example(np.concatenate([before, after]), trained)

    def _encode_chat(self, row: Row) -> Example:
        messages, origin = read_conversation(row, self._data, self._sft), origin_of(row)
        tools = read_tools(row, self._data)
        require_in_prompt(self._options["chat_template"], messages, tools, origin, ends=True)
        render = partial(self._render, origin=origin, tools=tools)
        if self._sft.loss_on == "all":
            token_ids = np.asarray(self._encode(render(messages)), np.int32)
            return _make_example(token_ids, np.ones(len(token_ids), np.bool_))
        if self._is_marked:
            return self._use_marks(messages, render, origin)
        return self._use_prefixes(messages, render, origin)

    def _use_marks(self, messages: list[Message], render: Callable[..., Any], origin: str) -> Example:
        """The template says what the assistant wrote; of a prompt with a response, only the response is trained on."""
        if any(m["role"] == ASSISTANT and not (m["content"] or m.get("tool_calls")) for m in messages):
            do = "fill it in, or leave the row out"
            raise refuse(origin, "an empty turn of the assistant, which no mark can show", "words in it", do)
        token_ids, runs = _find_marked(messages, render)
        if self._sft.messages_key is None:
            runs = runs[len(_find_marked(messages[:-1], render)[1]) :]
        trained = np.zeros(len(token_ids), np.bool_)
        for start, end in runs:
            if end < len(token_ids) and int(token_ids[end]) in self._stop:
                last = end  # some templates mark the words only
            elif (start, end) != runs[-1] and not self._stop.intersection(token_ids[start:end].tolist()):
                last = end - 1  # one of several blocks of a turn, such as its thoughts
            else:
                last = start + self._find_end(token_ids[start:end].tolist(), origin)
            trained[start : last + 1] = True
        return _make_example(token_ids, trained)

    def _use_prefixes(self, messages: list[Message], render: Callable[..., Any], origin: str) -> Example:
        """Between the conversation before a turn, open for the assistant, and the conversation through it, is the turn.

        The text is encoded up to each border as the engine would encode it, so that no token spans one.
        """
        whole = render(messages)
        turns = [n for n, message in enumerate(messages) if message["role"] == ASSISTANT]
        if self._sft.messages_key is None:
            turns = turns[-1:]
        tokens = _GrowingTokens(self._encode)
        trained: list[bool] = []
        for n in turns:
            if n == 0:
                do = "use a template with {% generation %} marks, or set sft.loss_on=all"
                raise refuse(origin, "a conversation that begins with the assistant", "one before the assistant", do)
            before = render(messages[:n], add_generation_prompt=True)
            through = render(messages[: n + 1])
            if not (whole.startswith(through) and through.startswith(before)):
                what = f"{origin}: the chat template writes the conversation before message {n + 1} differently"
                do = "add {% generation %} marks to the template, or set sft.loss_on=all"
                raise DataError(f"{what} than as part of the whole; expected the same text, then the answer; {do}")
            trained += [False] * len(tokens.extend(before))
            turn = tokens.extend(through)
            end = self._find_end(turn, origin)
            trained += [place <= end for place in range(len(turn))]  # a line end behind it is never generated
        trained += [False] * len(tokens.extend(whole))
        return _make_example(np.asarray(tokens.ids, np.int32), np.asarray(trained, np.bool_))

    def _find_end(self, turn: Sequence[int], origin: str) -> int:
        """Where the end token of a turn is: the last one, with nothing but blanks behind it. Raises DataError."""
        ends = [place for place, token in enumerate(turn) if token in self._stop]
        if ends and not self._tokenizer.decode(turn[ends[-1] + 1 :]).strip():
            return ends[-1]
        known = ", ".join(self._tokenizer.convert_ids_to_tokens(sorted(self._stop)))
        do = "set rollout.stop_token_ids to the token that ends a turn, or fix the template"
        what = f"{origin}: the chat template ends the assistant's turn with no token that ends a response"
        raise DataError(f"{what}; expected one of {known}; {do}")

    def _encode(self, text: str) -> list[int]:
        """The special tokens of a template are in its text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _render(self, messages: list[Message], *, origin: str, tools: Any, **options: Any) -> Any:
        options = {"tokenize": False, "tools": tools, **options, **self._options}
        try:
            return self._tokenizer.apply_chat_template([dict(message) for message in messages], **options)
        except Exception as error:  # a template raises what it likes, in a sandbox
            raise explain_failure(error, origin, messages) from error


def _find_marked(messages: list[Message], render: Callable[..., Any]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """(tokens, [start, end) of each run of tokens that the template marks)."""
    out = render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    marks = np.asarray(out["assistant_masks"], np.int8)
    edges = np.flatnonzero(np.diff(marks, prepend=0, append=0)).reshape(-1, 2)
    return np.asarray(out["input_ids"], np.int32), [(int(start), int(end)) for start, end in edges]


class _GrowingTokens:
    """The tokens of a text that grows, encoded at each border as if it ended there: no token spans a border."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self.ids: list[int] = []
        self._encode, self._text = encode, ""

    def extend(self, text: str) -> list[int]:
        """``text`` begins with the text so far; returns the tokens of the rest."""
        known, longer = len(self.ids), self._encode(text)
        new = longer[known:] if longer[:known] == self.ids else self._encode(text[len(self._text) :])
        self.ids += new
        self._text = text
        return new


def _make_example(token_ids: np.ndarray, trained: np.ndarray) -> Example:
    trained = trained.copy()
    trained[:1] = False
    return Example(token_ids=token_ids, loss_mask=trained)

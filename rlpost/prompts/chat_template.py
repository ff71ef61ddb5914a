"""A model's chat template: rendered without transformers for ``rlpost check``, its clock, and its errors.

In a run transformers renders (``encoding``); :class:`ChatTemplate` does the same from the model's files, in the same
sandbox of Jinja (no attributes of Python objects, nothing can be changed), so that a conversation that the template
refuses is known in seconds. ``tests/prompts/test_chat_template.py`` holds the two together. A template that asks for
the time is given the run's start, which checkpoints keep: otherwise no resume would have the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rlpost.errors import DataError, ModelError, UserError
from rlpost.models.files import read_optional_json

CLOCK = "strftime_now"  # the only way to the time that transformers gives a template
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers', with its space


def clock_options(template: Any, started: datetime) -> dict[str, Any]:
    """What to give a template (text, or several by name) so that its clock stands at ``started``."""
    return {CLOCK: started.strftime} if CLOCK in str(template) else {}


def explain_failure(error: Exception, origin: str, messages: Sequence[Mapping[str, str]]) -> UserError:
    """What a chat template raised for a row, in one line."""
    from jinja2 import TemplateSyntaxError

    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        return ModelError(f"model.path: the chat template cannot be read: {reason}; fix it, or set data.chat=never")
    roles = ", ".join(message["role"] for message in messages)
    do = "change the row, data.system_prompt or data.template, or set data.chat=never"
    return DataError(
        f"{origin}: the chat template fails: {reason[:500]}; expected another conversation than {roles}; {do}"
    )


class ChatTemplate:
    """The chat template of a model's folder, and its special tokens. Compiled once; rendering is pure."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ModelError where the source is no template."""
        from jinja2 import TemplateSyntaxError

        self.source, self._special_tokens = source, dict(special_tokens)
        try:
            self._template = _make_environment().from_string(source)
        except TemplateSyntaxError as error:
            raise explain_failure(error, "", ()) from None

    def render(self, messages: Sequence[Mapping[str, str]], *, origin: str, started: datetime) -> str:
        """The prompt's text; a last message of the assistant is left open. Raises DataError with the reason."""
        conversation = [dict(message) for message in messages]
        words = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
        if words is not None:
            conversation[-1]["content"] = words + TAG
        options = {**self._special_tokens, **clock_options(self.source, started)}
        try:
            text = self._template.render(
                messages=conversation, tools=None, documents=None, add_generation_prompt=words is None, **options
            )
            return text if words is None else _cut_at_tag(text, words)
        except Exception as error:  # a template raises what it likes, in a sandbox
            raise explain_failure(error, origin, messages) from error


def _cut_at_tag(text: str, words: str) -> str:
    if words.strip() not in text or TAG.strip() not in text:
        raise ValueError("the last message of the assistant is not in the prompt as it was written")
    at = text.rindex(TAG.strip())
    return text[:at] if text[at : at + len(TAG)] == TAG else text[:at].rstrip()


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The template that transformers would use for a conversation; None where the folder has none."""
    settings = read_optional_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    try:
        source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
    except (UnicodeDecodeError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(
            f"{folder}: the chat template cannot be read: {reason}; fix it, or set data.chat=never"
        ) from None
    if not isinstance(source, str) or not source:
        return None
    named = {**read_optional_json(folder / "special_tokens_map.json"), **settings}
    tokens = {name: _text_of(named[name]) for name in SPECIAL_TOKENS if named.get(name)}
    return ChatTemplate(source, tokens)


def _text_of(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _make_environment() -> Any:
    """As transformers makes it: its sandbox, whitespace rules, filters, functions, and the tag ``generation``."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks the assistant's words for training on them; here it changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals[CLOCK] = lambda text: datetime.now().strftime(text)
    return environment

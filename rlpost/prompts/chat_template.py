"""The chat template of a run: which one it is, what it is given, its clock, its errors; and rendering it here.

In a run transformers renders (``encoding``); :class:`ChatTemplate` does the same from the model's files, in the same
sandbox of Jinja (no attributes of Python objects, nothing can be changed), so that a conversation that the template
refuses is known in seconds, without transformers. ``tests/prompts/test_chat_template.py`` holds the two together.
:func:`choose_template` decides for both whether there is a template, and which. A template that asks for the time is
given the run's start, which checkpoints keep: otherwise no resume would have the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rlpost.config import DataConfig
from rlpost.config.locations import is_template_text, resolve_path
from rlpost.errors import ConfigError, DataError, ModelError, UserError, explain
from rlpost.models.files import read_optional_json

CLOCK = "strftime_now"  # the only way to the time that transformers gives a template
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers', with its space
DEFAULT = "default"  # of several templates by name, the one that transformers takes for a conversation without tools
WITH_TOOLS = "tool_use"  # the one that it takes with tools, if there is one
# What rlpost passes, special tokens, and the parameters of transformers' functions on the way to the template.
RESERVED = frozenset(
    """
    messages tools documents add_generation_prompt continue_final_message tokenize conversation conversations
    chat_template padding truncation max_length return_tensors return_dict return_assistant_tokens_mask
    tokenizer_kwargs raise_exception self
    """.split()
) | {CLOCK, *SPECIAL_TOKENS}


class ChatTemplate:
    """A chat template with what it is given besides the messages. Compiled once; rendering is pure."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        arguments: Mapping[str, Any] | None = None,
        *,
        key: str = "model.path",
    ) -> None:
        """``arguments``: those of ``data.chat_template_kwargs``; ``key``: where the template is from, for messages.

        Raises ModelError or ConfigError where the source is no template, ConfigError for an argument that the template
        never reads.
        """
        from jinja2 import TemplateSyntaxError
        from jinja2.meta import find_undeclared_variables

        self.source, self._special_tokens = source, dict(special_tokens)
        self._arguments = dict(arguments or {})
        environment = _make_environment()
        try:
            self._template = environment.from_string(source)
            names = find_undeclared_variables(environment.parse(source)) if self._arguments else set()
        except TemplateSyntaxError as error:
            raise _unreadable(key, " ".join(str(error).split())) from None
        _check_names(self._arguments, names)

    def options(self, started: datetime) -> dict[str, Any]:
        """What to give the template by name: the user's arguments, and a clock that stands at ``started``."""
        return {**self._arguments, **({CLOCK: started.strftime} if CLOCK in self.source else {})}

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, origin: str, started: datetime, tools: Any = None
    ) -> str:
        """The prompt's text; a last message of the assistant is left open. Raises DataError with the reason."""
        conversation = [dict(message) for message in messages]
        words = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
        if words is not None:
            conversation[-1]["content"] = words + TAG
        options = {**self._special_tokens, **self.options(started)}
        try:
            text = self._template.render(
                messages=conversation, tools=tools, documents=None, add_generation_prompt=words is None, **options
            )
            return text if words is None else _cut_at_tag(text, words)
        except Exception as error:  # a template raises what it likes, in a sandbox
            raise explain_failure(error, origin, messages) from error


def choose_template(data: DataConfig, own: Any, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate | None:
    """The template that prompts are rendered with; None: they are plain text.

    Args:
        own: the tokenizer's: text, or several by name as a mapping; empty or None where it has none.
        special_tokens: of the tokenizer, by name; needed for :meth:`ChatTemplate.render` only.

    Raises ConfigError or ModelError where there should be a template and is none, or none that can be used.
    """
    if data.chat == "never":
        return None
    key = "model.path" if data.chat_template is None else "data.chat_template"
    source = (
        _choose_own(own, with_tools=data.tools_key is not None)
        if data.chat_template is None
        else read_template_key(data.chat_template)
    )
    if source is not None:
        return ChatTemplate(source, special_tokens or {}, data.chat_template_kwargs, key=key)
    expected = "a tokenizer with a chat template"
    if data.chat == "always":
        raise ConfigError(explain("data.chat", "always", expected, "set data.chat_template, or use data.chat=never"))
    if data.chat_template_kwargs:
        do = "set data.chat_template, or leave them out"
        raise ConfigError(explain("data.chat_template_kwargs", _list(data.chat_template_kwargs), expected, do))
    return None


def read_template_key(value: str) -> str:
    """The text of ``data.chat_template``, which holds it or names its file. Raises ConfigError."""
    key, expected = "data.chat_template", "a Jinja file, or a template with {{ or {% in it"
    if is_template_text(value):
        return value
    path = Path(resolve_path(value))
    if not value or not path.is_file():
        what = "a folder" if value and path.is_dir() else "nothing there"
        raise ConfigError(explain(key, f"{value} ({what})", expected, "check the path"))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(key, f"{path}: {error}") from None
    if not text.strip():
        raise ConfigError(explain(key, f"{value} (an empty file)", expected, "check the file"))
    return text


def read_chat_template(folder: Path, data: DataConfig) -> ChatTemplate | None:
    """:func:`choose_template` for the tokenizer in a model's folder, without loading it."""
    settings = read_optional_json(folder / "tokenizer_config.json")
    named = {**read_optional_json(folder / "special_tokens_map.json"), **settings}
    tokens = {name: _text_of(named[name]) for name in SPECIAL_TOKENS if named.get(name)}
    return choose_template(data, _read_own(folder, settings.get("chat_template")), tokens)


def check_arguments(data: DataConfig) -> None:
    """What can be said of ``data.chat_template_kwargs`` without the template. Raises ConfigError."""
    key = "data.chat_template_kwargs"
    for name, value in data.chat_template_kwargs.items():
        if name in RESERVED:
            do = "take it out: rlpost or the tokenizer sets it"
            raise ConfigError(explain(key, name, "arguments of the template's own, such as enable_thinking", do))
        if not _is_json(value):
            do = "write text, numbers, booleans, null, lists or mappings"
            raise ConfigError(explain(f"{key}.{name}", value, "a value that JSON has a form for", do))


def explain_failure(error: Exception, origin: str, messages: Sequence[Mapping[str, Any]]) -> UserError:
    """What a chat template raised for a row, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    roles = ", ".join(message["role"] for message in messages)
    do = "change the row, data.system_prompt or data.template, or set data.chat=never"
    return DataError(
        f"{origin}: the chat template fails: {reason[:500]}; expected another conversation than {roles}; {do}"
    )


def _unreadable(key: str, reason: str) -> UserError:
    is_own = key == "data.chat_template"
    do = f"fix it, or set {'data.chat_template=null' if is_own else 'data.chat=never'}"
    return (ConfigError if is_own else ModelError)(f"{key}: the chat template cannot be read: {reason}; {do}")


def _check_names(arguments: Mapping[str, Any], names: set[str]) -> None:
    """Raises ConfigError for an argument that is not among the ``names`` that the template reads."""
    unread = [name for name in arguments if name not in names]
    if unread:
        own = sorted(names - RESERVED)
        expected = f"names that the chat template reads ({', '.join(own)})" if own else "none: the template reads none"
        raise ConfigError(explain("data.chat_template_kwargs", _list(unread), expected, "correct it, or take it out"))


def _list(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(str, names))


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _choose_own(own: Any, *, with_tools: bool) -> str | None:
    if isinstance(own, Mapping) and own:
        name = WITH_TOOLS if with_tools and WITH_TOOLS in own else DEFAULT
        if name not in own:
            expected = f"one that is named {DEFAULT}"
            do = "set data.chat_template to the file of the one to use, or data.chat=never"
            raise ModelError(explain("model.path", f"chat templates named {_list(sorted(own))}", expected, do))
        own = own[name]
    if own and not isinstance(own, str):
        raise _unreadable("model.path", f"got {type(own).__name__}; expected text")
    return own or None


def _read_own(folder: Path, setting: Any) -> Any:
    """What transformers loads as a tokenizer's ``chat_template``: its files take the place of the setting."""
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    try:
        found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
        if found:
            return found[DEFAULT] if list(found) == [DEFAULT] else found
        if isinstance(setting, list):  # several, by name
            return {entry["name"]: entry["template"] for entry in setting}
    except (OSError, UnicodeDecodeError, KeyError, TypeError) as error:
        # Whatever data.chat says: transformers does not load such a tokenizer.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"{folder}: the chat template cannot be read: {reason}; fix it, or take it out") from None
    return setting


def _cut_at_tag(text: str, words: str) -> str:
    if words.strip() not in text or TAG.strip() not in text:
        raise ValueError("the last message of the assistant is not in the prompt as it was written")
    at = text.rindex(TAG.strip())
    return text[:at] if text[at : at + len(TAG)] == TAG else text[:at].rstrip()


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

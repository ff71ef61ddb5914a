"""Data rows to encoded prompts, and the order in which they are drawn.

Owns reading JSONL, hub and generated rows, putting the template (or the tokenizer's chat template) round a question,
and the cursor over epochs. Never keeps a prompt after it is drawn: that is the buffer's. ``loop``, ``evaluate`` and
``checks`` call it. ``datasets`` and ``transformers`` are imported inside the two functions that need them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlpost import plugins
from rlpost.config import DataConfig, SourceConfig
from rlpost.errors import ConfigError, DataError, ModelError, explain
from rlpost.locations import resolve_path
from rlpost.types import Prompt


class Row(dict[str, Any]):
    """One data row: its columns, and where it came from, for messages (``train.jsonl line 3``)."""

    def __init__(self, columns: Mapping[str, Any], origin: str) -> None:
        super().__init__(columns)
        self.origin = origin


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """Every prompt of a source, in the source's order; ``uid`` is empty until a draw gives one."""

    prompts: tuple[Prompt, ...]
    num_dropped: int  # longer than the limit, with data.long_prompts=drop


# -- rows ----------------------------------------------------------------------------------------------------------


def load_rows(source: SourceConfig, *, prompt_key: str = "prompt", key: str = "data.train") -> list[Row]:
    """The rows of a source: its file, else the hub's dataset, else its generator.

    Args:
        prompt_key: the column that ``source.unique`` compares.
        key: the config key of the source, for messages.

    Raises DataError for a file that is missing, malformed (with the line) or empty, and ConfigError for no source.
    """
    if source.path is not None:
        rows = read_jsonl(Path(resolve_path(source.path)), key=f"{key}.path")
    elif source.hub is not None:
        rows = _load_hub(source, key)
    elif source.generator is not None:
        rows = _generate(source.generator, f"{key}.generator")
    else:
        raise ConfigError(f"{key}: no source; expected one of path, hub, generator; set {key}.path=FILE.jsonl")
    if source.unique:
        rows = _leave_out_repeats(rows, prompt_key)
    rows = rows if source.limit is None else rows[: source.limit]
    if not rows:
        raise DataError(explain(key, "no rows", "at least one", "check the source and its limit"))
    return rows


def read_jsonl(path: Path, key: str = "data") -> list[Row]:
    """One JSON object a line; blank lines are skipped. Raises DataError naming file and line."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing there"
        raise DataError(f"{key}: {what} at {path}; expected a JSONL file; check the path")
    rows: list[Row] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    rows.append(_parse_line(line, f"{path} line {number}"))
    except OSError as error:
        raise DataError(f"{key}: cannot read {path}: {error.strerror}; check its permissions") from None
    if not rows:
        raise DataError(f"{key}: {path} is empty; expected one JSON object a line; check the path")
    return rows


def _parse_line(line: bytes, origin: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8-sig"))  # Windows editors put a mark before the first line
        if b"\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 (byte {error.start}); expected JSONL in UTF-8; convert it") from None
    except UnicodeEncodeError:
        got = "half a surrogate pair (\\ud800 to \\udfff)"
        raise DataError(f"{origin}: {got}; expected Unicode text; mend the line") from None
    except RecursionError:
        raise DataError(f"{origin}: nested too deeply; expected a JSON object with named columns; mend it") from None
    except json.JSONDecodeError as error:
        got = f"not JSON ({error.msg} at column {error.colno})"
        raise DataError(f"{origin}: {got}; expected one JSON object a line; mend the line") from None
    if not isinstance(value, dict):
        got = type(value).__name__
        raise DataError(f"{origin}: got {got}; expected a JSON object with named columns; mend the line")
    return Row(value, origin)


def _load_hub(source: SourceConfig, key: str) -> list[Row]:
    from datasets import load_dataset

    name = f"{source.hub}" + (f" ({source.subset})" if source.subset else "")
    try:
        dataset = load_dataset(source.hub, source.subset, split=source.split)
    except Exception as error:  # the library raises its own, the hub's, and the network's errors
        reason = " ".join(str(error).split())
        do = f"check name, subset, split and network, or set {key}.path to a local file"
        raise DataError(f"{key}.hub: cannot load {name}, split {source.split}: {reason}; {do}") from error
    return [_plain_row(columns, f"{name} row {index}") for index, columns in enumerate(dataset)]


def _generate(generator: Any, key: str) -> list[Row]:
    made = plugins.resolve_target(generator, {}, key)()
    if not isinstance(made, Sequence) or not all(isinstance(columns, Mapping) for columns in made):
        raise DataError(explain(key, type(made).__name__, "a list of mappings", "return one mapping of columns a row"))
    return [_plain_row(columns, f"{key} row {index}") for index, columns in enumerate(made)]


def _plain_row(columns: Mapping[str, Any], origin: str) -> Row:
    """The row as JSON would give it back, so that a reward sees the same values before and after a resume.

    NumPy's numbers and arrays become plain ones; what JSON has no form for (dates, bytes, images) becomes its text.
    """

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)

    try:
        return Row(json.loads(json.dumps(columns, default=plain)), origin)
    except (TypeError, ValueError, RecursionError) as error:  # keys that are no text, values that hold themselves
        raise DataError(f"{origin}: {error}; expected columns of JSON values; mend the source") from None


def _leave_out_repeats(rows: Iterable[Row], prompt_key: str) -> list[Row]:
    seen: set[str] = set()
    kept = []
    for row in rows:
        fingerprint = json.dumps(look_up(row, prompt_key), sort_keys=True, default=str)
        if fingerprint not in seen:
            seen.add(fingerprint)
            kept.append(row)
    return kept


def look_up(row: Mapping[str, Any], key: str) -> Any:
    """The column ``key``; dots reach into it (``reward_model.ground_truth``). Raises DataError with the columns."""
    value: Any = row
    if key in row:
        return row[key]
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            columns = ", ".join(map(str, row)) or "none"
            do = "set data.prompt_key or data.reference_key"
            raise DataError(f"{_origin(row)}: no column {key!r}; its columns are {columns}; {do}")
        value = value[part]
    return value


# -- prompts -------------------------------------------------------------------------------------------------------


def build_prompts(rows: Sequence[Row], data: DataConfig, tokenizer: Any, *, max_prompt_tokens: int | None) -> PromptSet:
    """Encodes every row, with the chat template where ``data.chat`` says so and the tokenizer has one.

    Args:
        tokenizer: anything with ``encode(text)`` and, for chat, ``chat_template`` and ``apply_chat_template``.
        max_prompt_tokens: the longest prompt allowed, tokens; None: any.

    Raises DataError for a missing column, a question that is no text, an empty prompt, a prompt that is too long
    (unless ``data.long_prompts`` is drop), and when nothing is left.
    """
    chat = uses_chat(data, tokenizer)
    prompts: list[Prompt] = []
    num_dropped = 0
    for row in rows:
        messages = make_messages(row, data)
        token_ids = _encode_chat(tokenizer, messages) if chat else tokenizer.encode(join_messages(messages))
        if not len(token_ids):
            raise DataError(f"{_origin(row)}: the prompt has no tokens; expected at least one; check data.template")
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
    """Chat messages of a row: the system prompt, if any, then the question with ``data.template`` round it.

    A column that already holds messages (``[{role, content}, ...]``) is kept; the template goes round its last one.
    """
    question = look_up(row, data.prompt_key)
    if isinstance(question, str):
        messages = [{"role": "user", "content": question}]
    elif _are_messages(question):
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in question]
    else:
        got = type(question).__name__
        raise DataError(f"{_origin(row)}: {data.prompt_key} is {got}; expected text or a list of chat messages")
    messages[-1]["content"] = _fill_template(data.template, row, messages[-1]["content"])
    if data.system_prompt:
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    return messages


def join_messages(messages: Sequence[Mapping[str, str]]) -> str:
    """The text of a prompt where no chat template is used: the contents, one after the other."""
    return "\n\n".join(message["content"] for message in messages)


def describe_long(row: Mapping[str, Any], got: int, limit: int) -> str:
    do = "set data.long_prompts=drop, or raise data.max_prompt_tokens or model.max_context_tokens"
    return f"{_origin(row)}: the prompt has {got} tokens; expected at most {limit}; {do}"


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The Hugging Face tokenizer of a folder, a hub name, or ``rlpost://NAME``. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_path(path), revision=revision)
    except Exception as error:  # reads config.json too, whose validation raises the library's own errors
        reason = " ".join(str(error).split())
        do = "check the folder, the name, the network"
        raise ModelError(f"model.path: no tokenizer at {path}: {reason}; {do}") from error


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
        task=str(row.get("task", "")),
        columns={name: value for name, value in row.items() if name not in (data.prompt_key, data.reference_key)},
    )


def _fill_template(template: str, row: Mapping[str, Any], question: str) -> str:
    try:
        return template.format_map({**row, "prompt": question})
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        columns = ", ".join(["prompt", *(str(name) for name in row if name != "prompt")])
        do = "write other braces twice, as in \\boxed{{}}"
        message = f"data.template: {error!r} in {template!r}; expected columns ({columns}) in braces; {do}"
        raise ConfigError(message) from None


def _are_messages(value: Any) -> bool:
    if not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value)


def _origin(row: Mapping[str, Any]) -> str:
    return getattr(row, "origin", "row")


# -- drawing -------------------------------------------------------------------------------------------------------


def digest_prompts(prompts: Sequence[Prompt]) -> str:
    """A short name for the prompts' tokens, references and order."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(prompt.token_ids.tobytes() + repr(prompt.reference).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def draw_prompts(cursor: PromptCursor, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    """An endless iterator over ``prompts``; each ``next`` is one draw of the cursor and gives the prompt its uid."""
    while True:
        uid, row = cursor.draw()
        yield replace(prompts[row], uid=uid)


class PromptCursor:
    """Draws rows epoch after epoch; every row once an epoch, in an order of the seed and the epoch only.

    A uid names the draw, ``epoch:position``; :meth:`find_row` gives its row at any time, without drawing.

    Example: 3 rows, shuffle off: ``0:0, 0:1, 0:2, 1:0, ...``.
    """

    def __init__(self, num_rows: int, seed: int = 0, shuffle: bool = True, content: str = "") -> None:
        """``content``: :func:`digest_prompts` of the rows; a resume refuses other data of the same length."""
        if num_rows < 1:
            raise DataError(explain("data", f"{num_rows} rows", "at least one", "check the source"))
        self.num_rows, self.seed, self.shuffle, self.content = num_rows, seed, shuffle, content
        self._epoch, self._position = 0, 0
        self._order_epoch, self._order = -1, np.zeros(0, np.int64)

    @property
    def num_drawn(self) -> int:
        """Draws made so far."""
        return self._epoch * self.num_rows + self._position

    def draw(self) -> tuple[str, int]:
        """(uid, row index) of the next draw."""
        uid = f"{self._epoch}:{self._position}"
        row = self._row(self._epoch, self._position)
        self._position += 1
        if self._position == self.num_rows:
            self._epoch, self._position = self._epoch + 1, 0
        return uid, row

    def find_row(self, uid: str) -> int:
        """The row index that a uid names, whether it was drawn yet or not."""
        epoch, position = (int(part) for part in uid.split(":"))
        return self._row(epoch, position)

    def state_dict(self) -> dict[str, int | bool | str]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "num_rows": self.num_rows,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "content": self.content,
        }

    def load_state_dict(self, state: Mapping[str, int | bool | str]) -> None:
        """Goes on where ``state`` was taken. Raises DataError when data, seed or shuffling differ from then."""
        for name, do in (
            ("num_rows", "use the data the run was started with, or another name"),
            ("seed", "use the seed the run was started with, or another name"),
            ("shuffle", "set data.shuffle as it was, or use another name"),
            ("content", "the prompts differ: use the data, template and tokenizer of the start, or another name"),
        ):
            if state[name] != getattr(self, name):
                raise DataError(explain(f"resuming: {name}", getattr(self, name), repr(state[name]), do))
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def _row(self, epoch: int, position: int) -> int:
        if epoch != self._order_epoch:
            self._order_epoch, self._order = epoch, self._make_order(epoch)
        return int(self._order[position])

    def _make_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_rows)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)

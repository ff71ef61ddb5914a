"""``rlpost check --show-prompt``: the first and the longest prompt as a run has them, token by token.

Loads the tokenizer with transformers and encodes with ``prompts.encoding``, as a run does, so what is shown is what the
model would get. Called by ``cli`` after ``preflight.checks``; a dataset on the hub is loaded as on its first use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlpost.config import Config
from rlpost.errors import ConfigError, ModelError, escape_unprintable, explain
from rlpost.models.files import find_model, find_stop_tokens
from rlpost.models.tokenizer import load_tokenizer
from rlpost.preflight.checks import check_context, prompt_limit
from rlpost.prompts.encoding import PromptEncoder, ends_with_assistant, make_messages
from rlpost.prompts.messages import read_tools
from rlpost.prompts.rows import Row, chain
from rlpost.prompts.sources import load_split

WIDTH = 80  # columns of a terminal
INDENT = "  "
NUM_SHOWN = 1000  # tokens of a prompt; of a longer one the first and the last half of it
BOUNDARY, BREAK, REST = "│", "↵", "‥"
LEGEND = {
    BOUNDARY: "between two tokens, and at the end",
    "«": "« » around a special token",
    BREAK: "a line break",
    REST: "a token that is the rest of the character before it",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownPrompt:
    title: str  # which row it is, and how long
    text: str
    token_ids: tuple[int, ...]
    ending: str  # what the response follows


def show_prompts(cfg: Config, command: str) -> str:
    """The report, for a configuration that passed ``check``. Raises ConfigError, DataError or ModelError."""
    tokenizer, encoder, prompts = find_prompts(cfg, command)
    shown = [(prompt, _show(prompt, tokenizer, is_chat=encoder.is_chat)) for prompt in prompts]
    texts = [text for _, text in shown]
    lines = [f"Prompts as the model gets them: {_describe_form(cfg, is_chat=encoder.is_chat)}"]
    lines += [f"{INDENT}{sign}  {words}" for sign, words in LEGEND.items() if any(sign in text for text in texts)]
    for prompt, text in shown:
        lines += ["", prompt.title, text, prompt.ending]
    folder = find_model(cfg.model).folder
    assert folder is not None, "found above"
    stops = find_stop_tokens(cfg, tokenizer, folder)
    names = [f"{_name(tokenizer, token_id)} ({token_id})" for token_id in stops]
    return "\n".join([*lines, "", f"Responses end at: {', '.join(names)}"])


def find_prompts(cfg: Config, command: str) -> tuple[Any, PromptEncoder, list[ShownPrompt]]:
    """(tokenizer, its encoder, the first prompt and the longest one) of the data that ``command`` draws from."""
    if command == "sft":
        do = "leave --show-prompt out: it shows prompts, and supervised training has whole examples"
        raise ConfigError(explain("check --show-prompt", "--for sft", "train or eval", do))
    files = find_model(cfg.model)
    if files.folder is None:
        do = "download it first; `rlpost check` downloads no model"
        raise ModelError(explain("check --show-prompt", cfg.model.path, "a model in a folder or the local cache", do))
    split = "eval" if command == "eval" else "train"
    limit = prompt_limit(cfg, split, check_context(cfg, files))
    tokenizer = load_tokenizer(str(files.folder))
    encoder = PromptEncoder(cfg.data, tokenizer, datetime.now())
    rows = chain([own for _, own in load_split(cfg, split)])
    lengths = [len(_encode(row, cfg, encoder)[1]) for row in rows]
    kept = [index for index, length in enumerate(lengths) if length <= (limit or length)]
    if not kept:
        do = "raise the limit; `rlpost check` says which keys set it"
        raise ConfigError(explain("check --show-prompt", "no prompt", f"one of at most {limit} tokens", do))
    first, longest = kept[0], max(kept, key=lengths.__getitem__)
    allowed = "" if limit is None else f" of {limit:,} allowed"
    which = f"of {len(kept):,} in data.{split}"

    def describe(name: str, index: int) -> ShownPrompt:
        row = rows[index]
        text, token_ids, ending = _encode(row, cfg, encoder)
        title = f"{name} {which}: {len(token_ids):,} tokens{allowed}\n{INDENT}{escape_unprintable(row.origin)}\n"
        return ShownPrompt(title=title, text=text, token_ids=tuple(token_ids), ending=ending)

    if longest == first:
        name = "The only prompt" if len(kept) == 1 else "The first prompt, also the longest,"
        return tokenizer, encoder, [describe(name, first)]
    return tokenizer, encoder, [describe("The first prompt", first), describe("The longest prompt", longest)]


def _encode(row: Row, cfg: Config, encoder: PromptEncoder) -> tuple[str, Sequence[int], str]:
    """(text, tokens, where the response begins) of a row."""
    messages = make_messages(row, cfg.data)
    text = encoder.render(messages, row.origin, read_tools(row, cfg.data))
    ending = "The response begins here"
    if cfg.data.prefill:
        ending += ", after data.prefill."
    elif ends_with_assistant(messages):
        ending += ", after the assistant's words in the row."
    else:
        ending += "."
    return text, encoder.encode(text), ending


def _describe_form(cfg: Config, *, is_chat: bool) -> str:
    if not is_chat:
        return "plain text, without a chat template"
    return "the tokenizer's chat template" if cfg.data.chat_template is None else "the template in data.chat_template"


def _show(prompt: ShownPrompt, tokenizer: Any, *, is_chat: bool) -> str:
    """The tokens in lines of at most WIDTH columns."""
    pieces = split_at_tokens(tokenizer, prompt.text, prompt.token_ids, add_special_tokens=not is_chat)
    half = NUM_SHOWN // 2
    parts = [pieces] if len(pieces) <= NUM_SHOWN else [pieces[:half], pieces[-half:]]
    left_out = f"{INDENT}... {len(pieces) - NUM_SHOWN:,} tokens left out ..."
    lines = f"\n{left_out}\n".join("\n".join(_wrap(part)) for part in parts) + BOUNDARY
    # A tokenizer may turn what it does not know into one token, or change its input before it encodes.
    decoded = tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if prompt.text.strip() not in decoded:
        lines += f"\n{INDENT}Decoded, these tokens give another text: the tokenizer changes this prompt."
    return lines


def split_at_tokens(tokenizer: Any, text: str, token_ids: Sequence[int], *, add_special_tokens: bool) -> list[str]:
    """What to show of each token: its share of ``text``, in order, and ``«name»`` for a special token.

    Text that no token claims, such as blanks that the tokenizer drops, stands with the next one. Where the tokenizer
    cannot say which characters a token is from (it is not one of the ``tokenizers`` library), its entry of the
    vocabulary is shown.
    """
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    if not tokenizer.is_fast:
        names = [_name(tokenizer, token_id) for token_id in token_ids]
        return [f"«{name}»" if i in special else name for i, name in zip(token_ids, names, strict=True)]
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    assert encoded["input_ids"][: len(token_ids)] == list(token_ids), "encoded twice, differently"
    pieces, at = [], 0
    for token_id, (start, end) in zip(token_ids, encoded["offset_mapping"], strict=False):
        if token_id in special:
            pieces.append(_visible(text[at : max(at, start)]) + f"«{_name(tokenizer, token_id)}»")
        else:
            pieces.append(_visible(text[at:end]) if end > at else REST if end > start else "")
        at = max(at, end)
    return pieces


def _name(tokenizer: Any, token_id: int) -> str:
    return _visible(str(tokenizer.convert_ids_to_tokens(token_id)))


def _visible(text: str) -> str:
    """Line breaks as signs; whatever cannot be printed, and our own sign for a boundary, as escapes."""
    shown = "\n".join(map(escape_unprintable, text.split("\n"))).replace("\n", BREAK)
    return shown.replace(BOUNDARY, "\\u2502")


def _wrap(pieces: Sequence[str]) -> Iterator[str]:
    """Lines of tokens, each but the very first behind a boundary; a line ends at a line break or where it is full."""
    from rich.cells import cell_len

    line, room = "", WIDTH - len(INDENT)
    for number, piece in enumerate(pieces):
        shown = BOUNDARY * bool(number) + piece
        if line and cell_len(line) + cell_len(shown.partition(BREAK)[0]) > room:
            yield INDENT + line
            line = ""
        for character in shown:
            if cell_len(line) + cell_len(character) > room:  # a token longer than a line
                yield INDENT + line
                line = ""
            line += character
            if character == BREAK:
                yield INDENT + line
                line = ""
    if line:
        yield INDENT + line

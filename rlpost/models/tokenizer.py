"""A model's tokenizer: loaded by transformers for a run, or looked at in its files without, for ``rlpost check``.

``transformers`` and ``tokenizers`` are imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.config.locations import resolve_path
from rlpost.errors import ModelError
from rlpost.models.files import read_optional_json

NO_DEFAULTS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # classes without special tokens of their own


def load_tokenizer(path: str, revision: str | None = None, key: str = "model.path") -> Any:
    """The Hugging Face tokenizer of a folder, a hub name, or ``rlpost://NAME``. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_path(path), revision=revision)
    except Exception as error:  # also reads config.json, whose validation raises the library's own errors
        reason = " ".join(str(error).split())
        do = "check the folder, the name and the network"
        raise ModelError(f"{key}: no tokenizer at {path}: {reason}; {do}") from error


def check_ids(vocabulary: Mapping[str, int], vocab_size: int, origin: str) -> None:
    """Raises ModelError where the tokenizer has ids that the model's embedding has no row for."""
    largest = max(vocabulary.values(), default=-1)
    if largest >= vocab_size:
        do = "use the tokenizer that belongs to the model, or resize the model's embedding"
        expected = f"ids below {vocab_size:,}, vocab_size of {origin}"
        raise ModelError(f"tokenizer: got ids up to {largest:,}; expected {expected}; {do}")


class TokenizerFiles:
    """A folder's tokenizer.json, and what tokenizer_config.json says beside it. Needs no transformers."""

    def __init__(self, tokenizer_json: Path) -> None:
        """Raises ModelError for a file that cannot be read."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        except Exception as error:  # the Rust side raises plain Exception
            raise ModelError(
                f"{tokenizer_json}: cannot be read: {' '.join(str(error).split())}; fix the file"
            ) from None
        self._folder = tokenizer_json.parent

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> Sequence[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def count_tokens(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[int]:
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return [len(one.ids) for one in encoded]

    def may_have_end_token(self) -> bool:
        """False only where its files say that there is none; transformers' classes have defaults of their own."""
        named: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            named |= read_optional_json(self._folder / name)
        if "eos_token" in named:
            return named["eos_token"] is not None
        return named.get("tokenizer_class") not in NO_DEFAULTS

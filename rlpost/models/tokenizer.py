"""A model's tokenizer. ``transformers`` is imported inside the function."""

from __future__ import annotations

from typing import Any

from rlpost.config.locations import resolve_path
from rlpost.errors import ModelError


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The Hugging Face tokenizer of a folder, a hub name, or ``rlpost://NAME``. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_path(path), revision=revision)
    except Exception as error:  # also reads config.json, whose validation raises the library's own errors
        reason = " ".join(str(error).split())
        do = "check the folder, the name and the network"
        raise ModelError(f"model.path: no tokenizer at {path}: {reason}; {do}") from error

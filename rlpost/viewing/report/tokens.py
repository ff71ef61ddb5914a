"""Which characters of a response each token wrote, and how its logprob is encoded. Pure, except for reading a
tokenizer.

The text in a rollout file is authoritative; a token's own decoding is only searched for in it, since tokenizers drop
spaces between tokens and split characters over several tokens. Called by ``rollout_blocks``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rlpost.durable import checkpoint
from rlpost.durable.run_state import MODEL_FILES

TOKENIZER = "tokenizer.json"
REACH = 2  # characters that a decoder may put between two tokens
REPLACEMENT = "\ufffd"  # what a decoder writes for part of a character

# A logprob is stored as one printable character: 90 levels, increasingly wide from 0 on, each within 4 % of the value.
FIRST, LEVELS, SMALLEST, LARGEST = ord("#"), 90, 0.01, 20.0
# A difference of two logprobs has a sign: 44 levels on each side of 0, each within 13 % of the value.
SIDE, SMALLEST_DIFFERENCE = 44, 0.001
_STEP = math.log(LARGEST / SMALLEST_DIFFERENCE) / (SIDE - 1)
_GROWTH = (LARGEST / SMALLEST) ** (1 / (LEVELS - 2))


def find_tokenizer(run: Path) -> Path | None:
    """``tokenizer.json`` of the run's model, or else of its newest checkpoint."""
    newest_first = reversed(checkpoint.all_checkpoints(run / checkpoint.FOLDER))
    folders = [run / "model", *(path / MODEL_FILES for _, path in newest_first)]
    return next((folder / TOKENIZER for folder in folders if (folder / TOKENIZER).is_file()), None)


def load_decoder(file: Path) -> Callable[[int], str]:
    """One token's text by its id; each is decoded once."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    known: dict[int, str] = {}

    def decode(token_id: int) -> str:
        if token_id not in known:
            known[token_id] = tokenizer.decode([token_id], skip_special_tokens=False)
        return known[token_id]

    return decode


def piece_lengths(text: str, pieces: Sequence[str]) -> list[int] | None:
    """How many characters of ``text`` each token wrote; they add up to all of it. None if they do not match.

    A token whose own decoding is not found where it should be (part of a character) gets no characters; the next token
    that is found gets what is between.
    """
    lengths, at, missed = [], 0, 0
    for piece in pieces:
        found = text.find(piece, at, at + len(piece) + REACH + 4 * missed) if piece and REPLACEMENT not in piece else -1
        if found < 0:
            lengths.append(0)
            missed += 1
        else:
            lengths.append(found + len(piece) - at)
            at, missed = found + len(piece), 0
    if not lengths or len(text) - at > REACH + 4 * missed:
        return None if text else lengths
    lengths[-1] += len(text) - at
    return lengths


def encode_logprobs(logprobs: np.ndarray) -> str:
    """One character per token. ``!`` represents a value that is not a finite number."""
    values = np.asarray(logprobs, np.float64)
    size = np.clip(-values, 0.0, LARGEST)
    with np.errstate(divide="ignore"):
        levels = np.where(size < SMALLEST / 2, 0, 1 + np.round(np.log(size / SMALLEST) / math.log(_GROWTH)))
    levels = np.nan_to_num(np.clip(levels, 0, LEVELS - 1)).astype(int)
    return "".join(chr(FIRST + level) if ok else "!" for level, ok in zip(levels, np.isfinite(values), strict=True))


def encode_differences(differences: np.ndarray) -> str:
    """Signed, one character per token; ``!`` represents a value that is not a finite number."""
    values = np.asarray(differences, np.float64)
    size = np.clip(np.abs(values), 0.0, LARGEST)
    with np.errstate(divide="ignore"):
        levels = np.where(size < SMALLEST_DIFFERENCE / 2, 0, 1 + np.round(np.log(size / SMALLEST_DIFFERENCE) / _STEP))
    levels = np.sign(np.nan_to_num(values)) * np.nan_to_num(np.clip(levels, 0, SIDE))
    shown = (levels + SIDE).astype(int)
    return "".join(chr(FIRST + level) if ok else "!" for level, ok in zip(shown, np.isfinite(values), strict=True))


def difference_levels() -> list[float]:
    """The value of each of the 89 characters, in nats: 44 below 0, 0, 44 above."""
    above = [round(SMALLEST_DIFFERENCE * math.exp(_STEP * n), 5) for n in range(SIDE)]
    return [*(-value for value in reversed(above)), 0.0, *above]


def logprob_levels() -> list[float]:
    """The value of each of the 90 characters, in nats."""
    return [0.0, *(round(-SMALLEST * _GROWTH**n, 4) for n in range(LEVELS - 1))]

"""Which characters belong to which token, and logprobs as characters."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.viewing.report import tokens

from .making import TOKENIZER


@pytest.mark.parametrize(
    ("text", "pieces", "lengths"),
    [
        ("3+5=8", ["3", "+5", "=", "8"], [1, 2, 1, 1]),
        ("a b", ["a", "b"], [1, 2]),  # the decoder wrote a blank between them
        ("3#8", ["3", "#", "8", "<end>"], [1, 1, 1, 0]),  # an end token that the text leaves out
        ("é!", ["\ufffd", "\ufffd", "!"], [0, 0, 2]),  # a character of two tokens: the next one found gets it
        ("\U0001f600", ["\ufffd"] * 4, [0, 0, 0, 1]),
        ("", ["<end>"], [0]),
        ("", [], []),
        ("quite another text", ["a", "b"], None),
        ("text", [], None),
    ],
)
def test_piece_lengths(text: str, pieces: list[str], lengths: list[int] | None) -> None:
    assert tokens.piece_lengths(text, pieces) == lengths


@given(st.lists(st.text(max_size=6), max_size=20))
def test_lengths_add_up_to_the_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    lengths = tokens.piece_lengths(text, pieces)
    if lengths is not None:
        assert sum(lengths) == len(text) and len(lengths) == len(pieces)
    elif "\ufffd" not in text:
        assert not pieces


def test_logprobs_come_back_within_four_per_cent() -> None:
    values = -np.concatenate([[0.0], np.geomspace(0.01, 20, 500)])
    shown = [tokens.logprob_levels()[ord(c) - tokens.FIRST] for c in tokens.encode_logprobs(values)]
    assert shown[0] == 0
    assert np.abs(np.array(shown[1:]) / values[1:] - 1).max() < 0.05
    assert tokens.encode_logprobs(np.array([np.nan, -np.inf, -1e9]))[:2] == "!!"
    assert len(tokens.logprob_levels()) == tokens.LEVELS


def test_differences_keep_their_sign_and_come_back_within_thirteen_per_cent() -> None:
    sizes = np.geomspace(0.001, 20, 500)
    levels = tokens.difference_levels()
    assert len(levels) == 2 * tokens.SIDE + 1 and levels == sorted(levels) and levels[tokens.SIDE] == 0
    for values in (sizes, -sizes):
        shown = [levels[ord(c) - tokens.FIRST] for c in tokens.encode_differences(values)]
        assert np.abs(np.array(shown) / values - 1).max() < 0.13
    middle, *ends = tokens.encode_differences(np.array([3e-7, -1e9, 1e9]))
    assert [levels[ord(c) - tokens.FIRST] for c in (middle, *ends)] == [0, levels[0], levels[-1]]
    assert tokens.encode_differences(np.array([np.nan, np.inf])) == "!!"


def test_the_tokenizer_is_the_models_or_the_newest_checkpoints(tmp_path: Path) -> None:
    assert tokens.find_tokenizer(tmp_path) is None
    for name in ("checkpoints/step-000002/model_files", "checkpoints/step-000010/model_files"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "tokenizer.json").touch()
    assert tokens.find_tokenizer(tmp_path) == tmp_path / "checkpoints/step-000010/model_files/tokenizer.json"
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").touch()
    assert tokens.find_tokenizer(tmp_path) == tmp_path / "model/tokenizer.json"


def test_single_tokens_are_decoded_end_token_included() -> None:
    decode = tokens.load_decoder(TOKENIZER / "tokenizer.json")
    assert [decode(3), decode(10), decode(16)] == ["3", "+", "<end>"]

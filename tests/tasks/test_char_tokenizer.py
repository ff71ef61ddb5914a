"""Single characters in and out, with an end and a padding token."""

import pytest

from rlpost.config.locations import find_data
from rlpost.models.tokenizer import load_tokenizer
from rlpost.tasks.char_tokenizer import ARITHMETIC_CHARACTERS, END, PAD, write_char_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("characters")
    write_char_tokenizer(folder, "ab \n")
    return load_tokenizer(str(folder))


def test_ids_are_positions_and_text_comes_back(tokenizer):
    assert tokenizer.encode("ba a b") == [1, 0, 2, 0, 2, 1]
    assert tokenizer.decode([1, 0, 2, 2, 0]) == "ba  a", "spaces are characters like others"
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END, 4)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (PAD, 5)


def test_an_unknown_character_is_padding_and_special_tokens_are_no_text(tokenizer):
    assert tokenizer.encode("a?") == [0, 5]
    assert tokenizer.decode([0, 4, 5], skip_special_tokens=True) == "a"


def test_the_one_that_ships_was_made_by_it(tmp_path):
    write_char_tokenizer(tmp_path, ARITHMETIC_CHARACTERS)
    shipped, made = load_tokenizer(str(find_data() / "arithmetic")), load_tokenizer(str(tmp_path))
    assert shipped.get_vocab() == made.get_vocab() and shipped.eos_token_id == made.eos_token_id
    assert shipped.encode("3+5-2=6 #?") == made.encode("3+5-2=6 #?")

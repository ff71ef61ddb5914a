"""A tokenizer of single characters, for tasks whose text consists of a few symbols.

Writes a Hugging Face tokenizer folder; used once to create the one that ships with the arithmetic task, and by tests.
"""

from __future__ import annotations

from pathlib import Path

ARITHMETIC_CHARACTERS = "0123456789+-=#? "
END, PAD = "<end>", "<pad>"


def write_char_tokenizer(folder: Path | str, characters: str = ARITHMETIC_CHARACTERS) -> None:
    """Ids are positions in ``characters``, then end and padding. An unknown character becomes the padding token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(characters)} | {END: len(characters), PAD: len(characters) + 1}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    ).save_pretrained(str(folder))

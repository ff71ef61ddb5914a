"""Messages for users: one line, whatever text of theirs it quotes."""

from __future__ import annotations

import pickle

import pytest

from rlpost.errors import DataError, WorkerLost, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain; 中文, naïve, 😀", "plain; 中文, naïve, 😀"),
        ("one\n  two\r\n\nthree", "one two three"),
        ("a\x1b[31mb\x07", r"a\x1b[31mb\x07"),
        ("a\x1eb\x85c\u2028d", r"a\x1eb\x85c\u2028d"),
        ("half \ud83d", r"half \ud83d"),
    ],
)
def test_a_message_is_one_printable_line(text, line):
    assert one_line(text) == line and line.isprintable()
    assert one_line(line) == line
    assert str(DataError(text)) == line


def test_an_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(WorkerLost("rank 1\nis gone")))
    assert type(error) is WorkerLost and str(error) == "rank 1 is gone"

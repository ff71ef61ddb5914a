"""A contest's judge."""

import pytest

from rlpost.rewards.library.compare_output import same_output


@pytest.mark.parametrize(
    ("written", "expected", "same"),
    [
        (b"1 2\n3\n", "1 2\n3\n", True),
        (b"1 2  \n3\n\n\n", "1 2\n3", True),  # trailing spaces and empty lines
        (b"1 2\r\n3", "1 2\n3\n", True),
        (b"1  2\n3", "1 2\n3", False),  # spaces inside count
        (b" 1 2\n3", "1 2\n3", False),
        (b"1 2\n\n3", "1 2\n3", False),
        (b"1 2", "1 2\n3", False),
        (b"1 2\n3\n4", "1 2\n3", False),
        (b"", "", True),
        (b"\n", "", True),
        (b"", "0", False),
        ("größer".encode(), "größer", True),
        (b"\xff", "\ufffd", False),
        (b"1.0", "1", False),
        (b"YES", "Yes", False),
    ],
)
def test_lines_are_compared(written: bytes, expected: str, same: bool) -> None:
    assert same_output(written, expected) is same


@pytest.mark.parametrize(
    ("written", "expected", "same"),
    [
        (b"0.3333333", "0.333333333", True),
        (b"1.0 abc", "1 abc", True),
        (b"1000000.5", "1000000", True),  # relative
        (b"0.00001", "0", False),  # absolute near zero
        (b"0.0000001", "0", True),
        (b"nan", "1", False),
        (b"nan", "nan", True),
        (b"inf", "1e400", False),
        (b"1 2", "1", False),
        (b"abc", "abd", False),
        (b"1e0", "1", True),
    ],
)
def test_numbers_may_differ_a_little(written: bytes, expected: str, same: bool) -> None:
    assert same_output(written, expected, float_tolerance=1e-6) is same

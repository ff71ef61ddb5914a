"""The closed format between tester and candidate."""

import json
import math
import os
from collections import Counter, OrderedDict, namedtuple
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlpost.sandbox import wire

NUMBERS = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
HASHABLE = st.recursive(
    st.none() | NUMBERS | st.text() | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
VALUES = st.recursive(
    HASHABLE | st.binary().map(bytearray) | st.builds(range, st.integers(-9, 9), st.integers(-9, 9)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner)
        | st.sets(HASHABLE, max_size=3)
        | st.dictionaries(HASHABLE, inner, max_size=3)
    ),
    max_leaves=10,
)


def there_and_back(value: object, *, exact: bool) -> object:
    return wire.decode(json.loads(json.dumps(wire.encode(value, exact=exact), allow_nan=False)))


@given(VALUES)
def test_values_come_back_equal_and_of_the_same_type(value: object) -> None:
    for exact in (True, False):
        back = there_and_back(value, exact=exact)
        assert back == value and type(back) is type(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0, 2**64, -(2**200), "\ud800", [[]]])
def test_odd_values(value: object) -> None:
    assert repr(there_and_back(value, exact=True)) == repr(value)


def test_nan_is_nan() -> None:
    assert math.isnan(there_and_back({1: float("nan")}, exact=True)[1])


@pytest.mark.parametrize(
    ("value", "plain"),
    [(Counter("aab"), {"a": 2, "b": 1}), (OrderedDict(x=1), {"x": 1}), (namedtuple("P", "x")(1), (1,)), (True, True)],
)
def test_a_returned_value_is_encoded_as_what_it_is_a_kind_of(value: object, plain: object) -> None:
    back = there_and_back(value, exact=False)
    assert back == plain and type(back) is type(plain)
    if type(value) is not bool:
        with pytest.raises(wire.BadValue):
            wire.encode(value, exact=True)


def test_iterators_stay_iterators() -> None:
    back = there_and_back((n for n in range(3)), exact=False)
    assert iter(back) is back
    assert list(there_and_back(back, exact=True)) == [0, 1, 2]  # and may be handed on as an argument


@pytest.mark.parametrize("value", [object(), print, Fraction(1, 2), Counter, [lambda: 1]])
def test_what_has_no_form_is_refused(value: object) -> None:
    with pytest.raises(wire.BadValue):
        wire.encode(value, exact=False)


@pytest.mark.parametrize(
    "text",
    [
        '{"pickle": "gASVAA=="}',
        "{}",
        '{"tuple": [1], "list": [2]}',
        '{"tuple": "abc"}',
        '{"set": [[1]]}',
        '{"int": "zz"}',
        '{"float": "1e3"}',
        '{"dict": [[1]]}',
        '{"dict": 3}',
        '{"bytes": "0"}',
        '{"range": [1.5]}',
        '{"complex": ["1", 2]}',
        '{"iterator": {"a": 1}}',
        "[" * 200 + "]" * 200,
        '{"tuple": ' * 150 + "[]" + "}" * 150,
    ],
)
def test_what_is_no_form_of_ours_is_refused(text: str) -> None:
    with pytest.raises(wire.BadValue):
        wire.decode(json.loads(text))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_refused(data: bytes) -> None:
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    try:
        wire.read_frame(reading, 100)
    except (wire.BadValue, EOFError):
        pass
    finally:
        os.close(reading)


def test_frames_of_other_than_json_are_refused() -> None:
    for body in (b"NaN", b"\xff", b"[" * 50_000, b"9" * 10_000, b'"\xed\xa0\x80"'):
        reading, writing = os.pipe()
        os.write(writing, len(body).to_bytes(4, "big") + body)
        with pytest.raises(wire.BadValue):
            wire.read_frame(reading, 1 << 20)
        os.close(reading), os.close(writing)


def test_a_frame_too_large_is_refused_on_both_sides() -> None:
    reading, writing = os.pipe()
    with pytest.raises(wire.BadValue, match="more than 10"):
        wire.write_frame(writing, "x" * 20, 10)
    os.write(writing, b"\xff\xff\xff\xff")
    with pytest.raises(wire.BadValue, match="more than 10"):
        wire.read_frame(reading, 10)

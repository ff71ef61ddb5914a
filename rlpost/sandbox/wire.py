"""Values between tester and candidate: a closed format, JSON with tags. Standard library only.

A frame is four bytes of length (big endian) and JSON. None, booleans, text, finite floats, integers of up to 64 bits
and lists represent themselves; everything else is an object with one key, the tag: ``{"tuple": [1, 2]}``,
``{"dict": [[key, value], ...]}``, ``{"float": "nan"}``. Nothing is ever unpickled, and decoding builds only plain
built-in types, so the values a candidate returns cannot carry code: their ``==`` is Python's.

Arguments are encoded strictly (``exact``): a test that passes a function or an object of its own cannot be run here.
Returned values are encoded as their built-in base type: a Counter as a dict, a named tuple as a tuple.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

MAX_DEPTH = 100
# A returned value may come back as part of an argument, which must not fail then: arguments may be larger and deeper.
CALL_ROOM, CALL_DEPTH = 2, 10
MAX_ITEMS = 1_000_000  # of an iterator, which may be infinite
_SMALL = 1 << 63
_SMALL_DIGITS = len(str(-_SMALL))
_LIST_ITERATOR: type = type(iter([]))


class BadValue(Exception):
    """A value that cannot be represented here, or an invalid frame."""


# ---- encoding ------------------------------------------------------------------------------------------------------


def encode(value: Any, *, exact: bool, depth: int = 0) -> Any:
    """``value`` as JSON values and tags. Raises BadValue for other types and for more than MAX_DEPTH levels."""
    if depth > MAX_DEPTH:
        raise BadValue("nested too deeply")
    if value is None or value is True or value is False:
        return value
    kind = type(value)
    if kind is _LIST_ITERATOR:  # the type of a decoded iterator
        return {"iterator": _encode_all(value, exact, depth)}
    known = kind if kind in _ENCODERS else None
    if known is None and not exact:
        known = next((base for base in kind.__mro__ if base in _ENCODERS), None)
        if known is None and isinstance(value, Iterator):
            return {"iterator": _encode_all(_take(value), exact, depth)}
    if known is None:
        raise BadValue(f"a value of type {kind.__name__}")
    return _ENCODERS[known](value, exact, depth)


def _take(values: Iterator[Any]) -> Iterator[Any]:
    for number, value in enumerate(values):
        if number == MAX_ITEMS:
            raise BadValue(f"an iterator of more than {MAX_ITEMS} items")
        yield value


def _encode_all(values: Any, exact: bool, depth: int) -> list[Any]:
    return [encode(value, exact=exact, depth=depth + 1) for value in values]


def _encode_int(value: int, exact: bool, depth: int) -> Any:
    value = int(value)
    return value if -_SMALL <= value < _SMALL else {"int": f"{value:x}"}


def _encode_float(value: float, exact: bool, depth: int) -> Any:
    value = float(value)
    return value if math.isfinite(value) else {"float": repr(value)}


def _tagged(tag: str, plain: Any) -> Callable[[Any, bool, int], Any]:
    return lambda value, exact, depth: {tag: _encode_all(plain.__iter__(value), exact, depth)}


_ENCODERS: dict[type, Callable[[Any, bool, int], Any]] = {
    int: _encode_int,
    float: _encode_float,
    str: lambda value, exact, depth: str.__str__(value),
    complex: lambda value, exact, depth: {
        "complex": [_encode_float(value.real, exact, depth), _encode_float(value.imag, exact, depth)]
    },
    bytes: lambda value, exact, depth: {"bytes": bytes.hex(value)},
    bytearray: lambda value, exact, depth: {"bytearray": bytearray.hex(value)},
    range: lambda value, exact, depth: {"range": _encode_all((value.start, value.stop, value.step), exact, depth)},
    list: lambda value, exact, depth: _encode_all(list.__iter__(value), exact, depth),
    tuple: _tagged("tuple", tuple),
    set: _tagged("set", set),
    frozenset: _tagged("frozenset", frozenset),
    dict: lambda value, exact, depth: {"dict": [_encode_all(item, exact, depth) for item in dict.items(value)]},
}


# ---- decoding ------------------------------------------------------------------------------------------------------


def decode(value: Any, depth: int = 0) -> Any:
    """The Python value that :func:`encode` encoded. Raises BadValue for anything it cannot have produced."""
    if depth > MAX_DEPTH:
        raise BadValue("nested too deeply")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, depth + 1) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise BadValue("an object that is not a tag")
    ((tag, content),) = value.items()
    if tag not in _DECODERS:
        raise BadValue(f"unknown tag {tag[:20]!r}")
    try:
        return _DECODERS[tag](content, depth + 1)
    except (TypeError, ValueError, AttributeError) as error:  # an unhashable member, a pair of three, invalid hex
        raise BadValue(f"an invalid {tag} ({type(error).__name__})") from None


def _items(content: Any, depth: int) -> list[Any]:
    if not isinstance(content, list):
        raise BadValue("a tag without its list")
    return [decode(item, depth) for item in content]


def _special_float(content: Any, depth: int) -> float:
    if content not in ("nan", "inf", "-inf"):
        raise BadValue("an invalid float")
    return float(content)


_DECODERS: dict[str, Callable[[Any, int], Any]] = {
    "int": lambda content, depth: int(content, 16),
    "float": _special_float,
    "complex": lambda content, depth: complex(*_items(content, depth)),
    "bytes": lambda content, depth: bytes.fromhex(content),
    "bytearray": lambda content, depth: bytearray.fromhex(content),
    "range": lambda content, depth: range(*_items(content, depth)),
    "tuple": lambda content, depth: tuple(_items(content, depth)),
    "set": lambda content, depth: set(_items(content, depth)),
    "frozenset": lambda content, depth: frozenset(_items(content, depth)),
    "dict": lambda content, depth: dict(_items(pair, depth) for pair in content),
    "iterator": lambda content, depth: iter(_items(content, depth)),
}


# ---- frames --------------------------------------------------------------------------------------------------------


def write_frame(fd: int, message: Any, max_bytes: int) -> None:
    """Raises BadValue if the frame would be too large, BrokenPipeError if nobody reads."""
    try:
        body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    except RecursionError:
        raise BadValue("nested too deeply") from None
    if len(body) > max_bytes:
        raise BadValue(f"{len(body)} bytes, more than {max_bytes}")
    write_all(fd, len(body).to_bytes(4, "big") + body)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read_frame(fd: int, max_bytes: int) -> Any:
    """Raises EOFError if the writer is gone, BadValue for an invalid frame."""
    size = int.from_bytes(_read_exactly(fd, 4), "big")
    if size > max_bytes:
        raise BadValue(f"{size} bytes, more than {max_bytes}")
    try:
        body = _read_exactly(fd, size).decode("utf-8")
        return json.loads(body, parse_constant=_refuse_constant, parse_int=_parse_int)
    except RecursionError:
        raise BadValue("nested too deeply") from None
    except ValueError:  # not UTF-8, not JSON, an integer that should have been a tag
        raise BadValue("not JSON") from None


def _parse_int(digits: str) -> int:
    """Reading a long one takes time that a program would spend in the tests' name."""
    if len(digits) > _SMALL_DIGITS:
        raise ValueError(digits[:_SMALL_DIGITS])
    return int(digits)


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _read_exactly(fd: int, size: int) -> bytes:
    parts, missing = [], size
    while missing:
        part = os.read(fd, min(missing, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def read_whole(fd: int) -> bytes:
    """The entire content of a file, whatever its position."""
    os.lseek(fd, 0, os.SEEK_SET)
    parts = []
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)

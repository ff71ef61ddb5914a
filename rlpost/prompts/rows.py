"""Data rows: a row with its origin, and sequences of rows that are read only when they are asked for.

``prompts.sources`` makes them from a configuration, ``prompts.files`` from files. What a value may be is
``prompts.conversion``'s to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from rlpost.errors import DataError
from rlpost.prompts.conversion import plain_columns


class Row(dict[str, Any]):
    """One data row: its columns, and its origin for messages (``train.jsonl line 3``)."""

    def __init__(self, columns: Mapping[str, Any], origin: str) -> None:
        super().__init__(columns)
        self.origin = origin


class Rows(Sequence[Row]):
    """Rows that stay where they are: indexing reads one, a slice reads none, iterating keeps none.

    ``read(index)`` gives the row at ``chosen[index]``, or at ``index`` where nothing is chosen.
    """

    def __init__(self, num_rows: int, read: Callable[[int], Row], chosen: np.ndarray | None = None) -> None:
        self._read = read
        self._chosen = chosen  # i64[rows], or None: all, in order
        self._num_rows = num_rows if chosen is None else len(chosen)

    def __len__(self) -> int:
        return self._num_rows

    def __iter__(self) -> Iterator[Row]:
        return (self._row(index) for index in range(self._num_rows))

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return self.choose(np.arange(self._num_rows)[index])
        if not -self._num_rows <= index < self._num_rows:
            raise IndexError(index)
        return self._row(index % self._num_rows)

    def choose(self, indices: np.ndarray) -> Rows:
        """The rows at ``indices``, i64[rows]."""
        return Rows(0, self._read, indices if self._chosen is None else self._chosen[indices])

    def map(self, change: Callable[[Row], Row]) -> Rows:
        """The rows, each changed when it is read."""
        return Rows(self._num_rows, lambda index: change(self._row(index)))

    def _row(self, index: int) -> Row:
        return self._read(index if self._chosen is None else int(self._chosen[index]))


def chain(parts: Sequence[Rows]) -> Rows:
    """All rows of ``parts``, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([len(part) for part in parts])

    def read(index: int) -> Row:
        part = int(np.searchsorted(ends, index, side="right"))
        return parts[part][index - (int(ends[part - 1]) if part else 0)]

    return Rows(int(ends[-1]) if parts else 0, read)


def plain_rows(table: Sequence[Mapping[str, Any]], origin: str) -> Rows:
    """Rows as they would be read from JSON, so that a reward sees the same values before and after a resume."""

    def read(index: int) -> Row:
        where = f"{origin} row {index}"
        try:
            columns = table[index]
        except (ValueError, OverflowError) as error:  # Arrow's: a date that Python has not, text that is not UTF-8
            reason = " ".join(str(error).split())
            raise DataError(f"{where}: cannot be read: {reason}; leave the column out, or make it text") from None
        return Row(plain_columns(columns, where), where)

    return Rows(len(table), read)


def look_up(row: Mapping[str, Any], key: str) -> Any:
    """The column ``key``; dots reach into it (``reward_model.ground_truth``). Raises DataError listing the columns."""
    value: Any = row
    if key in row:
        return row[key]
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            columns = ", ".join(map(str, row)) or "none"
            do = "set data.prompt_key or data.reference_key, or data.format"
            raise DataError(f"{origin_of(row)}: no column {key!r}; its columns are {columns}; {do}")
        value = value[part]
    return value


def origin_of(row: Mapping[str, Any]) -> str:
    return getattr(row, "origin", "row")

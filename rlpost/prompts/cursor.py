"""The order in which prompts are drawn, as a cursor over epochs, of one source or of several.

Owns the draws: their order, their uids and the state that a resume needs. Never keeps a prompt after it is drawn: that
is the buffer's job. Called by ``run`` and ``sft.draws``. Reading rows is ``prompts.rows``, encoding them
``prompts.encoding``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from rlpost.errors import DataError, explain
from rlpost.prompts.encoding import PromptSet
from rlpost.types import Prompt


class Cursor(Protocol):
    """Draws rows; a uid names a draw."""

    @property
    def num_drawn(self) -> int: ...

    def draw(self) -> tuple[str, int]: ...

    def find_row(self, uid: str) -> int: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def open_cursor(sets: Sequence[PromptSet], *, seed: int, shuffle: bool) -> Cursor:
    """A new cursor over the prompts of one source or of several."""
    cursors = [PromptCursor(len(one.prompts), seed, shuffle, one.digest) for one in sets]
    if len(sets) == 1 and not sets[0].name:
        return cursors[0]
    return MixedCursor({one.name: (cursor, one.weight) for one, cursor in zip(sets, cursors, strict=True)})


def draw_prompts(cursor: Cursor, sets: Sequence[PromptSet]) -> Iterator[Prompt]:
    """An endless iterator over the prompts; each ``next`` is one draw of the cursor and gives the prompt its uid.

    Rows count on from one source to the next, in the order of ``sets``.
    """
    starts = np.cumsum([0, *(len(one.prompts) for one in sets)])
    while True:
        uid, row = cursor.draw()
        at = int(np.searchsorted(starts, row, side="right")) - 1
        yield replace(sets[at].prompts[row - int(starts[at])], uid=uid)


class PromptCursor:
    """Draws rows epoch after epoch; every row once per epoch, in an order that depends only on seed and epoch.

    A uid names the draw, ``epoch:position``; :meth:`find_row` gives its row at any time, without drawing.

    Example: 3 rows, shuffle off: ``0:0, 0:1, 0:2, 1:0, ...``.
    """

    def __init__(self, num_rows: int, seed: int = 0, shuffle: bool = True, content: str = "") -> None:
        """``content``: the digest of the prompts; a resume refuses other data of the same length."""
        if num_rows < 1:
            raise DataError(explain("data", f"{num_rows} rows", "at least one", "check the source"))
        self.num_rows, self.seed, self.shuffle, self.content = num_rows, seed, shuffle, content
        self._epoch, self._position = 0, 0
        self._order_epoch, self._order = -1, np.zeros(0, np.int64)

    @property
    def num_drawn(self) -> int:
        """Draws made so far."""
        return self._epoch * self.num_rows + self._position

    def draw(self) -> tuple[str, int]:
        """(uid, row index) of the next draw."""
        uid = f"{self._epoch}:{self._position}"
        row = self._row(self._epoch, self._position)
        self._position += 1
        if self._position == self.num_rows:
            self._epoch, self._position = self._epoch + 1, 0
        return uid, row

    def find_row(self, uid: str) -> int:
        """The row index that a uid names, whether or not it has been drawn yet."""
        epoch, position = (int(part) for part in uid.split(":"))
        return self._row(epoch, position)

    def state_dict(self) -> dict[str, int | bool | str]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "num_rows": self.num_rows,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "content": self.content,
        }

    def load_state_dict(self, state: Mapping[str, int | bool | str]) -> None:
        """Resume from ``state``. Raises DataError if data, seed or shuffling differ from then."""
        if "sources" in state:
            do = "restore the old data.train.sources, or use another name"
            raise DataError(explain("resuming: data.train.sources", "none", "those of the checkpoint", do))
        for name, do in (
            ("num_rows", "use the data the run was started with, or another name"),
            ("seed", "use the seed the run was started with, or another name"),
            ("shuffle", "restore the old data.shuffle, or use another name"),
            ("content", "the prompts differ: use the original data, template and tokenizer, or another name"),
        ):
            if state[name] != getattr(self, name):
                raise DataError(explain(f"resuming: {name}", getattr(self, name), repr(state[name]), do))
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def _row(self, epoch: int, position: int) -> int:
        if epoch != self._order_epoch:
            self._order_epoch, self._order = epoch, self._make_order(epoch)
        return int(self._order[position])

    def _make_order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_rows)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)


class MixedCursor:
    """Draws from several sources so that each one's share of the draws is that of its weight, at any time.

    The next draw is from the source that is furthest behind its share; within a source the draws are those of a
    :class:`PromptCursor`. A uid is ``NAME/epoch:position``. A row's index counts through all sources, in order.

    Example: weights 2 and 1: ``a/0:0, b/0:0, a/0:1, a/0:2, b/0:1, ...``.
    """

    def __init__(self, sources: Mapping[str, tuple[PromptCursor, float]]) -> None:
        """``sources``: NAME -> (a new cursor, its weight > 0)."""
        total = sum(weight for _, weight in sources.values())
        self._cursors = {name: cursor for name, (cursor, _) in sources.items()}
        self._shares = {name: weight / total for name, (_, weight) in sources.items()}
        ends = np.cumsum([0, *(cursor.num_rows for cursor in self._cursors.values())])
        self._starts = dict(zip(self._cursors, map(int, ends), strict=False))

    @property
    def num_drawn(self) -> int:
        return sum(cursor.num_drawn for cursor in self._cursors.values())

    def draw(self) -> tuple[str, int]:
        upcoming = self.num_drawn + 1
        name = max(self._cursors, key=lambda one: self._shares[one] * upcoming - self._cursors[one].num_drawn)
        uid, row = self._cursors[name].draw()
        return f"{name}/{uid}", self._starts[name] + row

    def find_row(self, uid: str) -> int:
        name, _, own = uid.rpartition("/")
        return self._starts[name] + self._cursors[name].find_row(own)

    def state_dict(self) -> dict[str, Any]:
        sources = {name: cursor.state_dict() for name, cursor in self._cursors.items()}
        return {"shares": dict(self._shares), "sources": sources}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``. Raises DataError if sources, weights, data, seed or shuffling differ from then."""
        before = state.get("shares")
        if before != self._shares or list(before) != list(self._shares):
            do = "restore the old data.train.sources, or use another name"
            raise DataError(explain("resuming: shares of the sources", self._shares, repr(before), do))
        for name, cursor in self._cursors.items():
            cursor.load_state_dict(state["sources"][name])

"""The order in which prompts are drawn, as a cursor over epochs.

Owns the draws: their order, their uids and the state that a resume needs. Never keeps a prompt after it is drawn: that
is the buffer's job. ``run`` is the caller. Reading rows is ``prompts.rows``, encoding them ``prompts.encoding``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from rlpost.errors import DataError, explain
from rlpost.types import Prompt


def digest_prompts(prompts: Sequence[Prompt]) -> str:
    """A short digest of the prompts' tokens, references and order."""
    digest = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        digest.update(prompt.token_ids.tobytes() + repr(prompt.reference).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def draw_prompts(cursor: PromptCursor, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    """An endless iterator over ``prompts``; each ``next`` is one draw of the cursor and gives the prompt its uid."""
    while True:
        uid, row = cursor.draw()
        yield replace(prompts[row], uid=uid)


class PromptCursor:
    """Draws rows epoch after epoch; every row once per epoch, in an order that depends only on seed and epoch.

    A uid names the draw, ``epoch:position``; :meth:`find_row` gives its row at any time, without drawing.

    Example: 3 rows, shuffle off: ``0:0, 0:1, 0:2, 1:0, ...``.
    """

    def __init__(self, num_rows: int, seed: int = 0, shuffle: bool = True, content: str = "") -> None:
        """``content``: :func:`digest_prompts` of the rows; a resume refuses other data of the same length."""
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

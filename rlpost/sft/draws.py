"""What a supervised run trains on, draw by draw: the examples of data files, or a generator's lessons.

A draw has a uid, ``epoch:position``. A source knows what it has drawn and can be brought back to that point; it refuses
to go on where the data are no longer the same. Called by ``sft.session`` and ``sft.run``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlpost.errors import DataError, explain
from rlpost.prompts.conversion import kind_of, refuse
from rlpost.prompts.cursor import PromptCursor
from rlpost.prompts.supervised import Example, ExampleEncoder, digest_examples


class Draws(Protocol):
    def draw(self) -> tuple[str, Example] | None:
        """(uid, example) of the next draw; None where all epochs are drawn."""

    @property
    def num_drawn(self) -> int: ...

    @property
    def epoch(self) -> float | None:
        """Passes over the data so far; None if it has no end."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``. Raises DataError if the data differ from then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """The examples of one step."""

    uids: list[str]
    examples: list[Example]

    @property
    def num_tokens(self) -> int:
        return sum(len(example.token_ids) for example in self.examples)


def draw_step(draws: Draws, tokens_per_step: int) -> Drawn:
    """Whole examples until they have ``tokens_per_step`` tokens; fewer at the end of the last epoch, then none."""
    uids: list[str] = []
    examples: list[Example] = []
    filled = 0
    while filled < tokens_per_step and (drawn := draws.draw()) is not None:
        uids.append(drawn[0])
        examples.append(drawn[1])
        filled += len(drawn[1].token_ids)
    return Drawn(uids=uids, examples=examples)


def count_steps(draws: RowDraws, tokens_per_step: int) -> int:
    """The steps that ``draws``, which is used up, makes of its epochs."""
    num_steps = 0
    while draw_step(draws, tokens_per_step).uids:
        num_steps += 1
    return num_steps


class RowDraws:
    """The examples of data files, each once per epoch, in an order that depends only on seed and epoch."""

    def __init__(self, examples: Sequence[Example], *, seed: int, shuffle: bool, epochs: int | None) -> None:
        """``epochs`` None: without end."""
        self._examples, self._epochs = examples, epochs
        self._cursor = PromptCursor(len(examples), seed, shuffle, digest_examples(examples))

    def draw(self) -> tuple[str, Example] | None:
        if self._epochs is not None and self.num_drawn >= self._epochs * len(self._examples):
            return None
        uid, row = self._cursor.draw()
        return uid, self._examples[row]

    @property
    def num_drawn(self) -> int:
        return self._cursor.num_drawn

    @property
    def epoch(self) -> float | None:
        return self.num_drawn / len(self._examples)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._cursor.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "num_rows" not in state:
            raise _other_source("sft.generator")
        self._cursor.load_state_dict(state)


class LessonDraws:
    """A generator's lessons, in its order.

    To go on from a point, it is begun anew and read up to there; a digest of all lessons read tells whether they are
    the same.
    """

    def __init__(self, begin: Callable[[], Iterator[Mapping[str, str]]], encoder: ExampleEncoder) -> None:
        self._begin, self._encoder = begin, encoder
        self._lessons = begin()
        self._num_read = self._num_drawn = 0
        self._digest = b""

    def draw(self) -> tuple[str, Example] | None:
        while True:
            prompt, response = self._read()
            example = self._encoder.encode_texts(prompt, response, f"sft.generator: lesson {self._num_read}")
            if example is not None:  # None: too long, and counted
                self._num_drawn += 1
                return f"0:{self._num_drawn - 1}", example

    @property
    def num_drawn(self) -> int:
        return self._num_drawn

    @property
    def epoch(self) -> float | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_read": self._num_read,
            "num_drawn": self._num_drawn,
            "num_dropped": self._encoder.num_dropped,
            "digest": self._digest.hex(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "num_read" not in state:
            raise _other_source("data.train")
        self._lessons, self._num_read, self._digest = self._begin(), 0, b""
        while self._num_read < state["num_read"]:
            self._read()
        if self._digest.hex() != state["digest"]:
            do = "use the generator and the arguments of then, or another name"
            raise DataError(explain("resuming: sft.generator", "other lessons than before", "the same ones", do))
        self._num_drawn, self._encoder.num_dropped = int(state["num_drawn"]), int(state["num_dropped"])

    def _read(self) -> tuple[str, str]:
        lesson = next(self._lessons, None)
        if lesson is None:
            do = "let it go on forever, or lower sft.steps"
            raise DataError(explain("sft.generator", f"an end after {self._num_read} lessons", "more lessons", do))
        self._num_read += 1
        if not isinstance(lesson, Mapping):
            what = f"sft.generator: lesson {self._num_read}"
            raise refuse(what, kind_of(lesson), "a mapping with prompt and response", "fix it")
        for key in ("prompt", "response"):
            if not isinstance(lesson.get(key), str):
                got = f"{kind_of(lesson.get(key))} as {key}"
                raise refuse(f"sft.generator: lesson {self._num_read}", got, "text", "fix it")
        prompt, response = lesson["prompt"], lesson["response"]
        text = f"{len(prompt)} {prompt}{response}".encode("utf-8", "surrogatepass")
        self._digest = hashlib.blake2b(self._digest + text, digest_size=8).digest()
        return prompt, response


def _other_source(before: str) -> DataError:
    do = "train on what the run was started with, or use another name"
    return DataError(explain("resuming: the source of examples", "another one", before, do))

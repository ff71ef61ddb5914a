"""What happens at the end of a model's turn: the one place where a sample may go on beyond what the model said.

``rollout.collect`` asks :data:`AfterTurn` whenever the model ended its turn (a stop token; a response that was cut at
the limit has no next turn). None: the sample is over and is scored. An :class:`Observation`: its tokens are appended,
not trained on, and the model has the next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlpost.types import Prompt, Segment


class Observation(NamedTuple):
    """What the model reads next, at least one token."""

    token_ids: np.ndarray  # i32[T]


AfterTurn = Callable[[Prompt, Sequence[Segment]], Observation | None]  # the sample's prompt and tokens so far


def score_it(prompt: Prompt, segments: Sequence[Segment]) -> None:
    """A sample is one turn."""
    return

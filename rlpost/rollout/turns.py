"""What happens at the end of a model's turn: the only place where a sample may continue after the model has stopped.

``rollout.collect`` calls :data:`AfterTurn` whenever the model ended its turn (a stop token; a response that was cut at
the limit has no next turn). None: the sample is finished and is scored. An :class:`Observation`: its tokens are
appended, not trained on, and the model takes the next turn.
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

"""Python's and NumPy's global random states as JSON values, for user code that draws from them.

rlpost itself does not: sampling seeds and data order are functions of the run's seed. The trainer saves torch's state.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np


def seed_all(seed: int) -> None:
    """Call it at the start of a run, after the libraries have drawn what they draw at startup."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    numpy_state = [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]
    return {"python": [version, list(words), gauss], "numpy": numpy_state}


def set_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, cached))

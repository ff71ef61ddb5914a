"""Which runs the study consists of, decided in advance: algorithms x strategies x seeds, and an exploration.

A cell is one run. All cells share the recipe ``math/arithmetic_long``; a cell adds the algorithm, the strategy and the
seed. Cells of one seed are paired: the seed decides the order of the prompts and the noise of every response, so runs
of one seed start alike and see the same prompts in the same order. Imports nothing heavy.
"""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import dataclass
from typing import Any

from rlpost.config import Config
from rlpost.config.compose import load_config

RECIPE = "math/arithmetic_long"
SYNC, PLAIN, CORRECTED = "sync", "april, no correction", "april, correction"
STRATEGIES = (SYNC, PLAIN, CORRECTED)
OVERSAMPLE, MAX_STALENESS = 2.0, 4  # of the main cells: the defaults, and the paper's values
SEEDS = {"grpo": range(5), "gspo": range(5), "dapo": range(3)}
EXPLORED_OVERSAMPLE, EXPLORED_STALENESS, EXPLORED_SEEDS = (1.5, 2.0, 3.0), (1, 4, 8), range(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    algo: str
    seed: int
    oversample: float
    max_staleness: int  # 0 is synchronous
    corrected: bool

    @property
    def strategy(self) -> str:
        return (CORRECTED if self.corrected else PLAIN) if self.max_staleness else SYNC

    @property
    def name(self) -> str:
        """For example ``gspo-april-s3``, ``grpo-sync-s0``, ``grpo-april-o3-v8-plain-s1`` (oversample 3, staleness
        8)."""
        parts = [self.algo, "april" if self.max_staleness else "sync"]
        if self.max_staleness and not self.is_main:
            parts += [f"o{self.oversample:g}", f"v{self.max_staleness}"]
        parts += ["plain"] if self.strategy == PLAIN else []
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def is_main(self) -> bool:
        return not self.max_staleness or (self.oversample, self.max_staleness) == (OVERSAMPLE, MAX_STALENESS)

    @property
    def overrides(self) -> list[str]:
        """The arguments of ``rlpost train``; everything else is the recipe's."""
        return [*self._groups, *(f"{key}={value}" for key, value in self._values.items())]

    def compose(self) -> Config:
        """The configuration given by the overrides; composed once for all cells of the same groups, since Hydra is
        slow."""
        cfg = copy.deepcopy(_compose(self._groups))
        for key, value in self._values.items():
            *sections, name = key.split(".")
            setattr(functools.reduce(getattr, sections, cfg), name, value)
        return cfg

    @property
    def _groups(self) -> tuple[str, ...]:
        rollout = "april" if self.max_staleness else "sync"
        return f"recipe={RECIPE}", f"algo={self.algo}", f"rollout={rollout}"

    @property
    def _values(self) -> dict[str, Any]:
        values = {
            "rollout.oversample": self.oversample,
            "rollout.max_staleness": self.max_staleness,
            "seed": self.seed,
        }
        return values if self.corrected else {**values, "algo.correction": "none"}


@functools.cache
def _compose(groups: tuple[str, ...]) -> Config:
    return load_config(list(groups))


def main_cells() -> list[Cell]:
    """Seed by seed, so that complete pairs are available early; within a seed the strategies take turns at being first,
    so that a machine that becomes slower or faster over time favors none."""
    cells = []
    for seed in range(max(map(len, SEEDS.values()))):
        for algo, seeds in SEEDS.items():
            if seed in seeds:
                turned = [STRATEGIES[(seed + n) % len(STRATEGIES)] for n in range(len(STRATEGIES))]
                cells += [main_cell(algo, strategy, seed) for strategy in turned]
    return cells


def main_cell(algo: str, strategy: str, seed: int) -> Cell:
    """Synchronous rollouts also have the correction on: it only sees the engine's mismatch, so it changes nothing."""
    sync = strategy == SYNC
    return Cell(
        algo=algo,
        seed=seed,
        oversample=1.0 if sync else OVERSAMPLE,
        max_staleness=0 if sync else MAX_STALENESS,
        corrected=strategy != PLAIN,
    )


def explored_cells() -> list[Cell]:
    """GRPO, with oversample <= staleness + 1; cells that are also main cells are run once."""
    return [
        Cell(algo="grpo", seed=seed, oversample=oversample, max_staleness=staleness, corrected=corrected)
        for seed, oversample, staleness, corrected in itertools.product(
            EXPLORED_SEEDS, EXPLORED_OVERSAMPLE, EXPLORED_STALENESS, (True, False)
        )
        if oversample <= staleness + 1
    ]


def all_cells() -> list[Cell]:
    """In the order in which they are run."""
    return list(dict.fromkeys([*main_cells(), *explored_cells()]))

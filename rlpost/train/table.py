"""Which optimizers and gradient reductions ship: names -> dotted paths, imported only when resolved.

A new one is a function and a line here; ``train.optimization`` has their signatures. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlpost.config import TrainConfig, plugins
from rlpost.config.plugins import Part

OPTIMIZERS = {"adamw": Part("rlpost.train.optimization.adamw")}
GRADIENT_REDUCTIONS = {"all_ranks": Part("rlpost.train.optimization.all_ranks")}
# The kind of a part is its key in TrainConfig.
TABLES: Mapping[str, Mapping[str, Part]] = {"optimizer": OPTIMIZERS, "gradient_reduction": GRADIENT_REDUCTIONS}


def check_train(train: TrainConfig) -> None:
    """Raises ConfigError for names that do not exist; imports no part."""
    for kind, table in TABLES.items():
        plugins.check_target(getattr(train, kind), table, f"train.{kind}")

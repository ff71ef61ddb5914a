"""Publications of the real trainer to the real engine, with a fault planted where only the canary can find it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from benchmarks.canary import planted
from rlpost.workers.publication import Publication


def weights_of(worker: Any) -> dict[str, Any]:
    return {name: tensor.detach().clone() for bucket in worker.trainer.iter_weights(1 << 30) for name, tensor in bucket}


def publish_with(worker: Any, fault: str, first: dict[str, Any]) -> Publication:
    """The fault takes the fingerprint's place. ``first``: older weights, where the fault needs some."""
    publisher = worker.device._publisher
    with ExitStack() as planting, pytest.MonkeyPatch.context() as patch:
        patch.setattr(publisher, "check_fingerprint", lambda: planting.enter_context(planted(worker, fault, first)))
        return worker.device.publish_weights(1)

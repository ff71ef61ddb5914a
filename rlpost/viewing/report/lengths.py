"""How long responses are, step by step: trained (from the rollout files), carried over and started (from the timeline).

First-finished admission favors short responses; these distributions side by side show how much. Called by ``build``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rlpost.reporting.timeline import StepTimeline

QUANTILES = {"p10": 0.1, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "max": 1.0}
Columns = dict[str, list[Any]]


def quantiles(by_step: Iterable[tuple[int, Sequence[int]]]) -> Columns:
    """Columns ``step``, ``count`` and one per quantile; steps without a sample are left out."""
    columns: Columns = {name: [] for name in ("step", "count", *QUANTILES)}
    for step, lengths in by_step:
        if len(lengths):
            columns["step"].append(step)
            columns["count"].append(len(lengths))
            for name, value in zip(QUANTILES, np.quantile(lengths, list(QUANTILES.values())), strict=True):
                columns[name].append(round(float(value), 2))
    return columns


def of_timeline(timeline: Sequence[StepTimeline]) -> dict[str, Columns]:
    """``launched``: tokens, at the end of the step, of samples first started in it. ``deferred``: tokens so far of
    those that an abort interrupted at its end."""
    so_far: dict[tuple[str, int], int] = {}
    launched, deferred = [], []
    for step in timeline:
        spans = step.spans
        started: set[tuple[str, int]] = set()
        paused: dict[tuple[str, int], bool] = {}
        for uid, index, tokens, kind, end in zip(
            spans["uid"], spans["index"], spans["tokens"], spans["kind"], spans["end"], strict=True
        ):
            sample = (uid, index)
            if kind == "launched":
                so_far[sample] = 0  # a group drawn again starts over
                started.add(sample)
            so_far[sample] = so_far.get(sample, 0) + tokens
            paused[sample] = end in ("paused", "lost")
        launched.append((step.step, [so_far[sample] for sample in started]))
        deferred.append((step.step, [so_far[sample] for sample, is_paused in paused.items() if is_paused]))
    return {"launched": quantiles(launched), "deferred": quantiles(deferred)}

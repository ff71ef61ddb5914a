"""Sums and counts of metrics over rows and ranks, and the values they come to. Pure; called by the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Sums = Mapping[str, tuple[float, float]]


def to_floats(rows: list[Mapping[str, tuple[Any, Any]]]) -> list[dict[str, tuple[float, float]]]:
    """Each row's metrics as Python floats, with one transfer from the device for all of them."""
    import torch

    flat = [value for row in rows for pair in row.values() for value in pair]
    tensors = [value for value in flat if torch.is_tensor(value)]
    moved = iter(torch.stack([t.detach().reshape(()).double() for t in tensors]).tolist() if tensors else [])
    floats = iter([next(moved) if torch.is_tensor(value) else float(value) for value in flat])
    return [{name: (next(floats), next(floats)) for name in row} for row in rows]


def merge(parts: Iterable[Sums]) -> dict[str, tuple[float, float]]:
    """Adds sums and counts by name; under a name ending ``/max`` the first number is a maximum, not a sum."""
    merged: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (value, count) in part.items():
            if not count:
                continue
            if name not in merged:
                merged[name] = (value, count)
            elif name.endswith("/max"):
                merged[name] = (_nan_max(merged[name][0], value), merged[name][1] + count)
            else:
                merged[name] = (merged[name][0] + value, merged[name][1] + count)
    return merged


def values(sums: Sums) -> dict[str, float]:
    """sum / count, or the maximum; a metric that nothing was counted for has no value and is left out."""
    return {name: value if name.endswith("/max") else value / count for name, (value, count) in sums.items() if count}


def _nan_max(a: float, b: float) -> float:
    return a if a != a or a >= b else b

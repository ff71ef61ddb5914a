"""The benchmarks' figures as SVG files: each strategy's rate as a share of the saturated one, and the scale curve.

Written by hand: bars with a whisker from minimum to maximum, or a line, are a few lines of code, and there is no
plotting library among the dependencies. Called by ``bench.rollout`` and ``benchmarks/scale.py``.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlpost.bench.result import Result
    from rlpost.bench.scale import Point

LABEL, WIDTH, ROW, GAP = 200, 420, 20, 34  # pixels
COLORS = {
    "saturated": "#9aa5b1",
    "synchronous": "#d98c5f",
    "published": "#6f9bd1",
    "published, slots by group": "#b3cbe8",
    "ours": "#2f855a",
    "ours, adaptive": "#68b38a",
    "ours, keep_kv": "#22543d",
}


def write_plot(file: Path, results: Sequence[Result]) -> None:
    """One block of bars per engine and length distribution: medians with the repeats' spread."""
    top = max((max(r.of_saturated) for r in results), default=1.0)
    parts, y, block = [], 10, None
    for r in results:
        if (r.engine, r.lengths) != block:
            block, y = (r.engine, r.lengths), y + GAP
            parts.append(f'<text x="4" y="{y - 8}" font-weight="bold">{escape(f"{r.engine}, {r.lengths}")}</text>')
        parts += _bar(r, y, WIDTH / max(1.0, top))
        y += ROW
    title = "Consumed tokens per second as a share of the saturated rate"
    _write(file, parts, width=LABEL + WIDTH + 70, height=y + 14, title=title)


def write_curve(file: Path, points: Sequence[Point]) -> None:
    """The controller's share of a step (percent, logarithmic) over the number of replicas (logarithmic)."""
    left, top, height, low, high = 70, 40, 240, 0.001, 10.0
    last = max(1.0, math.log2(max(p.replicas for p in points)))

    def place(replicas: int, percent: float) -> tuple[float, float]:
        fraction = math.log10(min(max(percent, low), high) / low) / math.log10(high / low)
        return left + WIDTH * math.log2(replicas) / last, top + height * (1 - fraction)

    parts = [f'<text x="4" y="20" font-weight="bold">{escape("Controller CPU time, % of the step")}</text>']
    for percent in (0.001, 0.01, 0.1, 1.0, 5.0, 10.0):
        y = place(1, percent)[1]
        color = "#c53030" if percent == 5.0 else "#e2e8f0"
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{percent:g}</text>')
    places = [place(p.replicas, 100 * p.share) for p in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{COLORS["ours"]}" stroke-width="2"/>')
    for p, (x, y) in zip(points, places, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLORS["ours"]}"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + height + 18}" text-anchor="middle">{p.replicas:,}</text>')
    parts.append(f'<text x="{left + WIDTH / 2}" y="{top + height + 38}" text-anchor="middle">replicas</text>')
    title = "The controller's CPU time as a share of a step, over the number of replicas"
    _write(file, parts, width=left + WIDTH + 40, height=top + height + 50, title=title)


def _write(file: Path, parts: Sequence[str], *, width: int, height: int, title: str) -> None:
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#1a202c"'
    background = f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="#ffffff"/>'
    body = "\n".join(parts)
    size = f'width="{width}" height="{height}"'
    file.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}\n{body}\n</svg>\n')


def _bar(r: Result, y: int, scale: float) -> list[str]:
    middle = statistics.median(r.of_saturated)
    low, high = (LABEL + scale * edge(r.of_saturated) for edge in (min, max))
    line = y + ROW / 2 - 1
    return [
        f'<text x="{LABEL - 8}" y="{y + 13}" text-anchor="end">{escape(r.strategy)}</text>',
        f'<rect x="{LABEL}" y="{y + 2}" width="{scale * middle:.1f}" height="{ROW - 6}" fill="{COLORS[r.strategy]}"/>',
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{line}" y2="{line}" stroke="#1a202c"/>',
        f'<text x="{high + 6:.1f}" y="{y + 13}">{middle:.3f}</text>',
    ]

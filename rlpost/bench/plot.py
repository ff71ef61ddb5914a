"""The benchmark's picture: each strategy's consumed rate as a share of the saturated one, as an SVG file.

Written by hand: bars with a whisker from least to greatest are a few lines, and no plotting library is among the
dependencies. Called by ``bench.rollout``.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlpost.bench.rollout import Result

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
    """One block of bars for each engine and length distribution, medians with the repeats' spread."""
    top = max((max(r.of_saturated) for r in results), default=1.0)
    parts, y, block = [], 10, None
    for r in results:
        if (r.engine, r.lengths) != block:
            block, y = (r.engine, r.lengths), y + GAP
            parts.append(f'<text x="4" y="{y - 8}" font-weight="bold">{escape(f"{r.engine}, {r.lengths}")}</text>')
        parts += _bar(r, y, WIDTH / max(1.0, top))
        y += ROW
    size = f'width="{LABEL + WIDTH + 70}" height="{y + 14}"'
    style = 'font-family="system-ui, sans-serif" font-size="12" fill="#1a202c"'
    title = "<title>Consumed tokens per second as a share of the saturated rate</title>"
    background = '<rect width="100%" height="100%" fill="#ffffff"/>'
    body = "\n".join(parts)
    file.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{title}{background}\n{body}\n</svg>\n')


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

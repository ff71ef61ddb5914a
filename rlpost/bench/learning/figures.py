"""The study's figures, as SVG files: accuracy over samples and over time, and the exploration.

Written by hand, like ``bench.plot``: there is no plotting library among the dependencies. A line is the mean over
seeds; the band around it is the 95 % t interval, drawn if there are at least three seeds. Called by ``page``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rlpost.bench.learning.analysis import Band, band_of, by_seed, explored
from rlpost.bench.learning.cells import CORRECTED, PLAIN, SEEDS, STRATEGIES, SYNC, explored_cells
from rlpost.bench.learning.table import Row

COLORS = {SYNC: "#c2673a", PLAIN: "#4a7fc1", CORRECTED: "#2f855a"}
WIDTH, HEIGHT, LEFT, TOP, GAP_X, GAP_Y = 270, 170, 62, 62, 30, 66  # pixels; of a panel and around it
LEGEND_WIDTH = 530
AXES = (("samples", "samples trained"), ("cpu_s", "CPU seconds of training"))
INK, SOFT = "#1a202c", "#cbd5e0"


@dataclass(frozen=True, slots=True)
class _Panel:
    left: float
    top: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float = WIDTH

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + self.width * (value - low) / (high - low), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(self.top + HEIGHT * (1 - (value - low) / (high - low)), 1)

    def frame(self, title: str, label: str, x_ticks: Sequence[float], *, names_y: bool) -> list[str]:
        bottom, parts = self.top + HEIGHT, []
        for tick in _ticks(*self.y_range, step=0.1 if self.y_range[1] - self.y_range[0] <= 0.6 else 0.2):
            y = self.y(tick)
            parts.append(f'<line x1="{self.left}" x2="{self.left + self.width}" y1="{y}" y2="{y}" stroke="{SOFT}"/>')
            if names_y:
                parts.append(_text(self.left - 6, y + 4, f"{100 * tick:.0f} %", anchor="end"))
        parts += [_text(self.x(tick), bottom + 16, f"{tick:,.0f}", anchor="middle") for tick in x_ticks]
        parts.append(_text(self.left + self.width / 2, bottom + 34, label, anchor="middle"))
        if title:
            parts.append(_text(self.left, self.top - 8, title, weight="bold"))
        return parts


def draw_curves(rows: Sequence[Row]) -> str:
    """Accuracy on held-out problems: a column for each algorithm, over samples above and over time below."""
    algos = [algo for algo in SEEDS if any(by_seed(rows, algo, s) for s in STRATEGIES)]
    parts = _legend()
    for row_number, (axis, label) in enumerate(AXES):
        bands = {
            (algo, strategy): band_of(list(runs.values()), axis)
            for algo in algos
            for strategy in STRATEGIES
            if (runs := by_seed(rows, algo, strategy))
        }
        y_range = _y_range([value for band in bands.values() for value in band.mean])
        for column, algo in enumerate(algos):
            mine = {strategy: bands[algo, strategy] for strategy in STRATEGIES if (algo, strategy) in bands}
            end = max(band.positions[-1] for band in mine.values())
            panel = _Panel(LEFT + column * (WIDTH + GAP_X), TOP + row_number * (HEIGHT + GAP_Y), (0, end), y_range)
            counts = sorted({band.num_seeds for band in mine.values()})
            seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
            title = f"{algo.upper()}, {seeds} seed{'s' * (counts[-1] > 1)}" if row_number == 0 else ""
            parts += panel.frame(title, label, _ticks(0, end, step=_nice(end / 4)), names_y=column == 0)
            parts += [part for s, band in mine.items() for part in _area(panel, s, band)]
            parts += [_line(panel, s, band) for s, band in mine.items()]
    width = max(LEGEND_WIDTH, LEFT + len(algos) * (WIDTH + GAP_X))
    return _svg(width, TOP + 2 * (HEIGHT + GAP_Y) - 20, "Accuracy over samples and over CPU time", parts)


def draw_exploration(rows: Sequence[Row]) -> str:
    """Final accuracy for each oversample ratio and staleness bound: a dot for each seed, a bar for their mean."""
    found = explored(rows, explored_cells())
    places = sorted({(staleness, oversample) for oversample, staleness, _ in found})
    sync = [row.final.accuracy for seed, row in by_seed(rows, "grpo", SYNC).items() if seed in (0, 1)]
    values = [row.final.accuracy for group in found.values() for row in group] + sync
    panel = _Panel(LEFT, TOP, (-0.5, max(0, len(places) - 1) + 0.5), _y_range(values), width=2 * WIDTH + GAP_X)
    parts = _legend() + panel.frame("GRPO", "", [], names_y=True)
    if sync:
        y = panel.y(sum(sync) / len(sync))
        ends = f'x1="{panel.left}" x2="{panel.left + panel.width}" y1="{y}" y2="{y}"'
        parts.append(f'<line {ends} stroke="{COLORS[SYNC]}" stroke-width="2" stroke-dasharray="6 4"/>')
    for number, (staleness, oversample) in enumerate(places):
        for offset, strategy in ((-0.14, PLAIN), (0.14, CORRECTED)):
            runs = found.get((oversample, staleness, strategy == CORRECTED), [])
            x, color = panel.x(number + offset), COLORS[strategy]
            for row in runs:
                parts.append(f'<circle cx="{x}" cy="{panel.y(row.final.accuracy)}" r="4" fill="{color}"/>')
            if runs:
                y = panel.y(sum(row.final.accuracy for row in runs) / len(runs))
                parts.append(f'<line x1="{x - 9}" x2="{x + 9}" y1="{y}" y2="{y}" stroke="{color}" stroke-width="2"/>')
        parts.append(_text(panel.x(number), TOP + HEIGHT + 16, f"S {staleness}", anchor="middle"))
        parts.append(_text(panel.x(number), TOP + HEIGHT + 32, f"{oversample:g} x N", anchor="middle"))
    title = "Accuracy at the end, by staleness bound and oversampling"
    return _svg(LEFT + 2 * (WIDTH + GAP_X), TOP + HEIGHT + 48, title, parts)


def _line(panel: _Panel, strategy: str, band: Band) -> str:
    points = " ".join(f"{panel.x(x)},{panel.y(v)}" for x, v in zip(band.positions, band.mean, strict=True))
    return f'<polyline points="{points}" fill="none" stroke="{COLORS[strategy]}" stroke-width="2"/>'


def _area(panel: _Panel, strategy: str, band: Band) -> list[str]:
    if band.low is None or band.high is None:
        return []
    low, high = panel.y_range
    edge = [*zip(band.positions, band.high, strict=True), *reversed(list(zip(band.positions, band.low, strict=True)))]
    points = " ".join(f"{panel.x(x)},{panel.y(min(high, max(low, v)))}" for x, v in edge)
    return [f'<polygon points="{points}" fill="{COLORS[strategy]}" fill-opacity="0.16"/>']


def _legend() -> list[str]:
    parts, x = [], LEFT
    for strategy, color in COLORS.items():
        parts.append(f'<rect x="{x}" y="14" width="22" height="4" fill="{color}"/>')
        parts.append(_text(x + 28, 20, strategy))
        x += 50 + 7 * len(strategy)
    return parts


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = f'font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif" font-size="12" fill="{INK}"'
    background = '<rect width="100%" height="100%" fill="#ffffff"/>'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" {style}>'
        f"<title>{escape(title)}</title>{background}\n{body}\n</svg>\n"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def _y_range(values: Sequence[float]) -> tuple[float, float]:
    """Whole tenths around the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return math.floor(10 * low - 0.2) / 10 if low > 0.02 else 0.0, min(1.0, math.ceil(10 * high + 0.2) / 10)


def _ticks(low: float, high: float, *, step: float) -> list[float]:
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _nice(step: float) -> float:
    """The next of 1, 2, 5 x a power of ten."""
    power = 10 ** math.floor(math.log10(max(step, 1e-9)))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)

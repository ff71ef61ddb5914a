"""A figure of a few steps of a run's timeline, as an animated SVG: docs/april.svg is made by it.

    python -m rlpost.viewing.timeline_figure RUN_DIR OUT.svg [--first STEP] [--steps N]

A bar is a stay of a sample in the engine, a row is one of the engine's slots, a color is the policy version that
sampled. A sample that is interrupted at the end of a step resumes in the next one, under the next policy; one such
sample is outlined and described in words. Time between two rollouts, while the trainer works, is drawn shorter than it
was. The complete figure is shown first, then drawn again from left to right; for users who have asked their system for
reduced motion it stays still. It has its own light and dark colors. Reads ``timeline.jsonl`` only.
"""

from __future__ import annotations

import argparse
import html
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpost.errors import RunError, explain
from rlpost.reporting.timeline import COLUMNS, StepTimeline, assign_slots, read_timeline

WIDTH, LEFT, RIGHT = 960, 20, 20
TOP, BOTTOM = 84, 96  # above and below the rows
ROWS_HEIGHT, MAX_ROW_HEIGHT = 384, 14
HUES = 5  # further policy versions reuse the colors
HOLD_S, DRAW_S = 5, 12
CUT_WIDTH = 1.6  # of the mark where a response was interrupted
TURN_WIDTH = 64  # of the trainer's turn, however long it was

STYLE = """
  .card { fill: #fbfcfe; stroke: #aab4c3 } text { fill: #1b2330 } .soft { fill: #55617a } .pause { fill: #e6eaf1 }
  .v0 { fill: #4a7fc1 } .v1 { fill: #d9822b } .v2 { fill: #3f9b6c } .v3 { fill: #a35fb5 } .v4 { fill: #b8a02c }
  .cut { fill: #1b2330 } .story { fill: none; stroke: #c81e3a; stroke-width: 2.2 } .cover { fill: #fbfcfe }
  @media (prefers-color-scheme: dark) {
    .card, .cover { fill: #1d222c } .card { stroke: #465064 } text { fill: #e4e8f0 } .soft { fill: #a3aec2 }
    .pause { fill: #2d3442 } .cut { fill: #e4e8f0 } .story { stroke: #ff6b81 }
    .v0 { fill: #6f9fdc } .v1 { fill: #e79a4f } .v2 { fill: #5bb487 } .v3 { fill: #bd82cc } .v4 { fill: #cdb750 }
  }
  .cover { animation: sweep %(all)ss linear infinite; transform: translateX(%(width)spx) }
  @keyframes sweep {
    0%%, %(hold)s%% { transform: translateX(%(width)spx) }
    %(again)s%% { transform: translateX(0) }
    100%% { transform: translateX(%(width)spx) }
  }
  @media (prefers-reduced-motion: reduce) { .cover { animation: none } }
"""

Span = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Rollout:
    """The generation of one step: its stays, and its start and end in seconds and in the figure."""

    step: int
    spans: list[Span]
    start_s: float
    end_s: float
    left: float
    right: float

    def x(self, time_s: float) -> float:
        share = (time_s - self.start_s) / (self.end_s - self.start_s)
        return round(self.left + share * (self.right - self.left), 1)


def draw(steps: Sequence[StepTimeline], *, name: str) -> str:
    """The SVG's text. ``steps`` are consecutive; raises RunError if none of them has a stay in an engine."""
    rollouts = _place(steps)
    if not rollouts:
        raise RunError(explain("figure", "steps without a rollout", "steps that generated", "choose others: --first"))
    spans = [span for rollout in rollouts for span in rollout.spans]
    slots = assign_slots([s["start_s"] for s in spans], [s["end_s"] for s in spans])
    row = min(MAX_ROW_HEIGHT, ROWS_HEIGHT / (max(slots) + 1))
    height = TOP + row * (max(slots) + 1) + BOTTOM
    bottom = height - BOTTOM
    highlight = _choose_highlight(spans)
    versions = sorted({span["policy_version"] for span in spans})
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img" aria-labelledby="title" '
        'font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif" font-size="13">',
        f'<title id="title">{_title(steps, name)}</title>',
        f"<style>{_style(WIDTH - LEFT - RIGHT)}</style>",
        f'<rect class="card" x="1" y="1" width="{WIDTH - 2}" height="{height - 2:.0f}" rx="12" stroke-width="1.5"/>',
        f'<clipPath id="rows"><rect x="{LEFT}" y="{TOP - 2}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{bottom - TOP + 4:.0f}"/></clipPath>',
        f'<text x="{LEFT}" y="30" font-size="15" font-weight="bold">{_title(steps, name)}</text>',
        f'<text class="soft" x="{LEFT}" y="50">A row is a slot in the engine, a bar is a response being generated; '
        "its color is the policy that samples it.</text>",
    ]
    for before, after in zip([None, *rollouts], rollouts, strict=False):
        lines += _heading(before, after, bottom)
    bars = []
    places = [rollout for rollout in rollouts for _ in rollout.spans]
    for rollout, span, slot in zip(places, spans, slots, strict=True):
        left, right = rollout.x(span["start_s"]), rollout.x(span["end_s"])
        width = max(0.6, right - left - 0.5)
        top = TOP + slot * row
        hue = versions.index(span["policy_version"]) % HUES
        bars.append(f'<rect class="v{hue}" x="{left}" y="{top:.1f}" width="{width:.1f}" height="{row * 0.82:.1f}"/>')
        if span["end"] == "paused":
            cut = left + width - CUT_WIDTH
            bars.append(
                f'<rect class="cut" x="{cut:.1f}" y="{top:.1f}" width="{CUT_WIDTH}" height="{row * 0.82:.1f}"/>'
            )
        if _sample(span) == _sample(highlight[0]):
            size = f'width="{width + 2:.1f}" height="{row * 0.82 + 2:.1f}"'
            bars.append(f'<rect class="story" x="{left - 1:.1f}" y="{top - 1:.1f}" {size}/>')
    size = f'width="{WIDTH - LEFT - RIGHT}" height="{bottom - TOP + 4:.0f}"'
    cover = f'<rect class="cover" x="{LEFT}" y="{TOP - 2}" {size}/>'
    lines += ['<g clip-path="url(#rows)">', *bars, cover, "</g>"]
    lines += _legend(versions, bottom + 46)
    lines += [f'<text x="{LEFT}" y="{bottom + 78:.0f}">{html.escape(_describe(highlight))}</text>', "</svg>"]
    return "\n".join(lines) + "\n"


def _spans(step: StepTimeline) -> Iterator[Span]:
    for values in zip(*(step.spans[name] for name in COLUMNS), strict=True):
        yield dict(zip(COLUMNS, values, strict=True))


def _sample(span: Span) -> tuple[str, int]:
    return span["uid"], span["index"]


def _place(steps: Sequence[StepTimeline]) -> list[_Rollout]:
    """Rollouts side by side, as wide as they were long, with the trainer's turns between them."""
    stays = [(step.step, list(_spans(step))) for step in steps]
    stays = [(step, spans) for step, spans in stays if spans]
    times = [(min(s["start_s"] for s in spans), max(s["end_s"] for s in spans)) for _, spans in stays]
    room = WIDTH - LEFT - RIGHT - TURN_WIDTH * (len(stays) - 1)
    scale = room / max(1e-9, sum(end - start for start, end in times))
    rollouts, left = [], float(LEFT)
    for (step, spans), (start, end) in zip(stays, times, strict=True):
        right = left + scale * (end - start)
        rollouts.append(_Rollout(step, spans, start, end, left, right))
        left = right + TURN_WIDTH
    return rollouts


def _choose_highlight(spans: Sequence[Span]) -> list[Span]:
    """The stays of a sample that begins and ends within the figure; of those, the one with the most stays, then the
    most tokens."""
    stays: dict[tuple[str, int], list[Span]] = defaultdict(list)
    for span in spans:
        stays[_sample(span)].append(span)
    return max(
        stays.values(), key=lambda s: (s[0]["kind"] == "launched" and s[-1]["end"] != "paused", len(s), _tokens(s))
    )


def _tokens(stays: Sequence[Span]) -> int:
    return sum(span["tokens"] for span in stays)


def _describe(stays: Sequence[Span]) -> str:
    parts = ", then ".join(f"{_count(s['tokens'])} by policy {s['policy_version']}" for s in stays)
    ended = "interrupted again" if stays[-1]["end"] == "paused" else "finished"
    times = {2: "once", 3: "twice"}.get(len(stays), f"{len(stays) - 1} times")
    how = f"interrupted {times} and {ended}" if len(stays) > 1 else ended
    return f"Outlined: one response, {how}: {parts}. No token was generated twice."


def _count(tokens: int) -> str:
    return f"{tokens} token{'s' * (tokens != 1)}"


def _title(steps: Sequence[StepTimeline], name: str) -> str:
    return html.escape(f"Steps {steps[0].step} to {steps[-1].step} of {name}")


def _heading(before: _Rollout | None, rollout: _Rollout, bottom: float) -> Iterator[str]:
    """Names a rollout, and the trainer's turn since the previous one."""
    middle = (rollout.left + rollout.right) / 2
    seconds = rollout.end_s - rollout.start_s
    words = f"step {rollout.step}: {seconds:.1f} s of generation"
    yield f'<text x="{middle:.0f}" y="{TOP - 12}" text-anchor="middle">{words}</text>'
    if before is not None:
        left, width = before.right + 1, rollout.left - before.right - 2
        yield f'<rect class="pause" x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{bottom - TOP:.0f}"/>'
        middle, pause = (before.right + rollout.left) / 2, rollout.start_s - before.end_s
        yield f'<text class="soft" x="{middle:.0f}" y="{TOP - 12}" text-anchor="middle">{pause:.1f} s</text>'


def _legend(versions: Sequence[int], y: float) -> Iterator[str]:
    left = LEFT
    for number, version in enumerate(versions):
        yield f'<rect class="v{number % HUES}" x="{left}" y="{y - 10:.0f}" width="14" height="11"/>'
        yield f'<text x="{left + 20}" y="{y:.0f}">policy {version}</text>'
        left += 92
    yield f'<rect class="cut" x="{left + 5}" y="{y - 10:.0f}" width="2" height="11"/>'
    yield f'<text x="{left + 14}" y="{y:.0f}">interrupted: tokens and logprobs are kept</text>'
    yield f'<rect class="pause" x="{left + 292}" y="{y - 10:.0f}" width="14" height="11"/>'
    yield f'<text x="{left + 312}" y="{y:.0f}">the trainer’s turn, not to scale</text>'


def _style(width: int) -> str:
    both = HOLD_S + DRAW_S
    hold = 100 * HOLD_S / both
    return STYLE % {"all": both, "width": width, "hold": f"{hold:.1f}", "again": f"{hold + 0.1:.1f}"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rlpost.viewing.timeline_figure", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=int, default=1, help="the first step shown")
    parser.add_argument("--steps", type=int, default=3, help="number of steps shown")
    parser.add_argument("--name", help="the run's name in the title; default: its folder's name")
    options = parser.parse_args(arguments)
    last = options.first + options.steps - 1
    steps = [step for step in read_timeline(options.run_dir) if options.first <= step.step <= last]
    if not steps:
        raise RunError(
            explain("figure", f"steps {options.first} to {last}", "steps of the run", "choose others: --first")
        )
    options.out.write_text(draw(steps, name=options.name or options.run_dir.name), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except RunError as error:
        sys.exit(f"timeline_figure: {error}")

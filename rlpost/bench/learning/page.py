"""The study as text and tables, written into a page of the documentation between two markers. Called by ``cli``.

``docs/april.md`` contains the markers; nothing between them is written by hand, and a test checks it against the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rlpost.bench.learning.analysis import (
    NO_WORSE,
    Difference,
    behind,
    by_seed,
    compare,
    comparisons,
    explored,
    last_gain,
)
from rlpost.bench.learning.cells import SEEDS, STRATEGIES, SYNC, Cell, all_cells, explored_cells, main_cells
from rlpost.bench.learning.figures import draw_curves, draw_exploration
from rlpost.bench.learning.study import choose_cells, digest_cells, valid_rows
from rlpost.bench.learning.table import CROWDED, Row, read_table
from rlpost.errors import DataError, explain
from rlpost.evaluation.intervals import Interval

BEGIN = "<!-- written by `rlpost bench learning --report` from the table; begin -->"
END = "<!-- end of what the command writes -->"
CURVES, EXPLORATION = "learning-curves.svg", "learning-exploration.svg"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    text: str  # Markdown
    pictures: dict[str, str]  # file name -> SVG


def write_report(table: Path, page: Path) -> Report:
    """Puts the tables into ``page`` and the figures beside ``table``.

    Raises DataError for a page without the markers, before anything is written.
    """
    cells = choose_cells(())
    rows = read_table(table)
    valid = valid_rows(cells, digest_cells(cells), rows)
    others = {row.key for row in rows} - {row.key for row in valid}
    report = make_report(valid, num_left_out=len(others), folder=table.parent.name)
    written = replace_section(page.read_text(encoding="utf-8"), report.text, name=str(page))
    for name, picture in report.pictures.items():
        (table.parent / name).write_text(picture, encoding="utf-8")
    page.write_text(written, encoding="utf-8")
    return report


def replace_section(page: str, text: str, *, name: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(explain(name, "no section for the report", f"a line {BEGIN} and later one {END}", "add them"))
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def make_report(rows: Sequence[Row], *, num_left_out: int = 0, folder: str = "studies") -> Report:
    """``rows``: those that are valid today; ``num_left_out``: how many are not. ``folder``: of the figures, relative to
    the page."""
    pictures = {}
    parts = [_state(rows, num_left_out)]
    if rows:
        pictures[CURVES] = draw_curves(rows)
        alt = "Accuracy on the held-out problems over trained samples and over CPU seconds, mean over seeds"
        parts += [f"![{alt}; bands: 95 % t intervals]({folder}/{CURVES})", _conclusions(rows), _runs_table(rows)]
    found = explored(rows, explored_cells())
    if any(key[:2] != (2.0, 4) for key in found):
        pictures[EXPLORATION] = draw_exploration(rows)
        alt = "Accuracy at the end for each staleness bound and oversample ratio, with and without correction"
        parts += [f"![{alt}]({folder}/{EXPLORATION})", _exploration_table(rows)]
    return Report(text="\n\n".join(parts), pictures=pictures)


def _state(rows: Sequence[Row], num_left_out: int) -> str:
    done = {row.cell for row in rows}
    main, more = (_count(done, cells) for cells in (main_cells(), [c for c in explored_cells() if not c.is_main]))
    text = f"**State: {main} runs of the comparison and {more} of the exploration are done.**"
    if rows:
        dates = sorted(row.date[:10] for row in rows)
        machines = ", ".join(sorted({row.machine for row in rows}))
        revisions = len({row.revision for row in rows})
        loads = [max(row.load_before, row.load_after) for row in rows]
        slower = [row.slower for row in rows]
        text += (
            f" Made {_span(dates)} on {machines}, {revisions} revision{'s' * (revisions > 1)} of the program, load "
            f"average {median(loads):.0f} (median), at most {max(loads):.0f}. By the clock training took "
            f"{median(slower):.2f} times its CPU time (median; at most {max(slower):.2f})."
        )
        compared = {cell.name for cell in main_cells()}
        if crowded := sum(row.is_crowded for row in rows if row.cell in compared):
            text += (
                f" In {crowded} runs of the comparison it was above {CROWDED}; their pairs are left out at equal time."
            )
    if num_left_out:
        text += f" {num_left_out} rows of other settings are in the table and not counted here."
    return text


def _conclusions(rows: Sequence[Row]) -> str:
    """What is claimed, and what is not."""
    lines = ["Differences to synchronous rollouts, in points of accuracy, pairs of one seed, 95 % t interval:", ""]
    lines += ["| Algorithm | Strategy | Pairs | At equal samples | At equal CPU time | Rollouts behind |"]
    lines += ["|---|---|---|---|---|---|"]
    for algo, strategy, baseline in comparisons():
        at_samples, at_time = (compare(rows, algo, strategy, baseline, at=at) for at in ("samples", "time"))
        if at_samples.seeds:
            pairs = f"{len(at_samples.seeds)} of {at_samples.num_planned}"
            if at_time.seeds != at_samples.seeds:
                pairs += f"; at equal time {len(at_time.seeds)}"
            lines.append(
                f"| {algo.upper()} | {strategy} | {pairs} | {_difference(at_samples)} | {_difference(at_time)} "
                f"| {_behind(behind(rows, algo, strategy, baseline))} |"
            )
    if len(lines) == 4:
        return "No pair of runs is complete yet."
    return "\n".join(lines)


def _difference(difference: Difference) -> str:
    if not difference.points:
        return "-"
    mean = sum(difference.points) / len(difference.points)
    if difference.interval is None:
        return f"{mean:+.1f} (one pair); not shown to be no worse"
    ends = f"{mean:+.1f} ({difference.interval.low:+.1f} to {difference.interval.high:+.1f})"
    if difference.conclusion == NO_WORSE:
        return f"{ends}; **no worse**"
    why = "" if difference.is_complete else ", pairs are missing"
    return f"{ends}; not shown to be no worse{why}"


def _behind(rollouts: Interval | None) -> str:
    return "-" if rollouts is None else f"{rollouts.mean:+.1f} ({rollouts.low:+.1f} to {rollouts.high:+.1f})"


def _runs_table(rows: Sequence[Row]) -> str:
    lines = [
        "The runs, means over their seeds. Carried: trained tokens that an older policy sampled; two and more: by two "
        "versions or more. Last gain: points since the second-to-last evaluation, a fifth of the run earlier. "
        "Correct: mean length of the correct responses at the end, tokens.",
        "",
        "| Algorithm | Strategy | Runs | Accuracy before and after | Last gain | Length before and after | Correct "
        "| Carried | Two and more | Clipped below, above | Truncated weights | CPU s, training | CPU s, all |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for algo in SEEDS:
        for strategy in STRATEGIES:
            runs = list(by_seed(rows, algo, strategy).values())
            if runs:
                lines.append(f"| {algo.upper()} | {strategy} | {len(runs)} | {_run_cells(runs, strategy)} |")
    return "\n".join(lines)


def _run_cells(runs: Sequence[Row], strategy: str) -> str:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    finals = [100 * r.final.accuracy for r in runs]
    older = [sum(share for lag, share in r.lag_shares.items() if lag not in ("lag_0", "lag_1")) for r in runs]
    cells = [
        f"{mean([100 * r.curve[0].accuracy for r in runs]):.1f}, {mean(finals):.1f} % "
        f"({min(finals):.1f} to {max(finals):.1f})",
        f"{mean([last_gain(r) for r in runs]):+.1f}",
        f"{mean([r.curve[0].response_tokens for r in runs]):.0f}, {mean([r.final.response_tokens for r in runs]):.0f}",
        f"{mean([r.right_tokens for r in runs]):.0f}",
        "-" if strategy == SYNC else f"{100 * mean([r.carried_share for r in runs]):.0f} %",
        "-" if strategy == SYNC else f"{100 * mean(older):.0f} %",
        f"{100 * mean([r.clip_low_share for r in runs]):.2f}, {100 * mean([r.clip_high_share for r in runs]):.2f} %",
        f"{100 * mean([r.changed_share for r in runs]):.2f} %",
        f"{mean([r.cpu_s for r in runs]):.0f}",
        f"{mean([r.total_cpu_s + r.eval_cpu_s for r in runs]):.0f}",
    ]
    return " | ".join(cells)


def _exploration_table(rows: Sequence[Row]) -> str:
    lines = [
        "Exploration: GRPO, accuracy at the end, % (one number per seed); two seeds prove nothing.",
        "",
        "| Staleness bound S | Oversample | Without correction | With correction | Idle | Carried "
        "| abs(log r), lag 2 and more |",
        "|---|---|---|---|---|---|---|",
    ]
    found = explored(rows, explored_cells())
    for staleness, oversample in sorted({(s, o) for o, s, _ in found}):
        plain, corrected = (found.get((oversample, staleness, flag), []) for flag in (False, True))
        both = [*plain, *corrected]
        idle, carried = (sum(getattr(r, name) for r in both) / len(both) for name in ("idle_share", "carried_share"))
        drift = sum(_late_drift(row) for row in both) / len(both)
        lines.append(
            f"| {staleness} | {oversample:g} | {_finals(plain)} | {_finals(corrected)} | {100 * idle:.0f} % "
            f"| {100 * carried:.0f} % | {drift:.3f} |"
        )
    return "\n".join(lines)


def _late_drift(row: Row) -> float:
    """Mean abs(old_logprobs - rollout_logprobs) of the tokens two versions old or older, nats."""
    late = [lag for lag in row.lag_shares if lag not in ("lag_0", "lag_1")]
    tokens = sum(row.lag_shares[lag] for lag in late)
    return sum(row.lag_shares[lag] * row.lag_abs_log_ratio[lag] for lag in late) / tokens if tokens else 0.0


def _finals(rows: Sequence[Row]) -> str:
    return ", ".join(f"{100 * row.final.accuracy:.1f}" for row in sorted(rows, key=lambda row: row.seed)) or "-"


def _count(done: set[str], cells: Sequence[Cell]) -> str:
    names = {cell.name for cell in cells}
    return f"{len(names & done)} of {len(names)}"


def _span(dates: Sequence[str]) -> str:
    return f"on {dates[0]}" if dates[0] == dates[-1] else f"from {dates[0]} to {dates[-1]}"


def list_cells(table: Path) -> str:
    """Every cell in the order in which it is run, and whether its row exists."""
    cells = all_cells()
    valid = {row.cell for row in valid_rows(cells, digest_cells(cells), read_table(table))}
    return "\n".join(f"{'done' if cell.name in valid else 'open':5} {cell.name}" for cell in cells)

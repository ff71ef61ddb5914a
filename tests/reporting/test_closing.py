"""The closing table: what it says, and what it leaves out when it was not measured or cannot be trusted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlpost.evaluation.intervals import Interval
from rlpost.reporting.closing import ClosingFacts, closing_table

FACTS = ClosingFacts(
    run_dir=Path("runs/demo"),
    steps=40,
    duration_s=305.0,
    num_problems=500,
    samples_per_problem=4,
    accuracy_before=Interval(mean=0.512, low=0.49, high=0.534),
    accuracy_after=Interval(mean=0.901, low=0.888, high=0.915),
    accuracy_gain=Interval(mean=0.389, low=0.37, high=0.41),
    response_tokens_before=30.2,
    response_tokens_after=51.7,
    rollout_tokens_per_s=4321.4,
    idle_share=0.041,
    carried_share=0.33,
    rollout_s=100.0,
    simulated_april_s=104.0,
    simulated_sync_s=190.0,
)


def test_all_rows() -> None:
    assert closing_table(FACTS).splitlines() == [
        "Done: 40 steps in 5 min 05 s",
        "----------------------------",
        "Accuracy before   51.2 % (49.0 to 53.4)",
        "Accuracy after    90.1 % (88.8 to 91.5)",
        "  difference      +38.9 points (+37.0 to +41.0, on the same problems)",
        "  measured on     500 problems not trained on, 4 responses each; in parentheses: 95 % interval",
        "Response length   30 tokens before, 52 after",
        "Generation speed  4,321 tokens/s that were trained on",
        "Idle share        4.1 % of the engine's slots were empty while it ran",
        "Carried over      33.0 % of trained tokens came from earlier steps",
        "Generation took   1 min 40 s",
        "  without APRIL   3 min 10 s (simulated; the simulator's error here: 4.0 %)",
        "Everything is in  runs/demo",
        "Where to look     runs/demo/metrics.jsonl (numbers), runs/demo/rollouts (every response trained on)",
        "As a page         rlpost report runs/demo",
        "                  docs/metrics.md explains each number",
    ]


def test_the_simulated_row_goes_when_the_simulator_is_off_by_more_than_a_tenth() -> None:
    assert "without APRIL" in closing_table(replace(FACTS, simulated_april_s=109.9))
    for error in (110.1, 89.0, None):
        assert "without APRIL" not in closing_table(replace(FACTS, simulated_april_s=error))
    assert "without APRIL" not in closing_table(replace(FACTS, simulated_sync_s=None))


def test_what_was_not_measured_has_no_row() -> None:
    table = closing_table(ClosingFacts(run_dir=Path("runs/x"), steps=2, duration_s=3.0))
    assert table.splitlines()[0] == "Done: 2 steps in 3 s"
    for word in ("Accuracy", "length", "speed", "Idle", "Carried", "None", "nan"):
        assert word not in table

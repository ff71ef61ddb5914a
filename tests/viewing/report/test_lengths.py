"""Length distributions, by hand."""

from rlpost.reporting.timeline import StepTimeline
from rlpost.viewing.report.lengths import of_timeline, quantiles


def test_quantiles_interpolate_and_skip_empty_steps() -> None:
    columns = quantiles([(1, [10, 20, 30, 40, 50]), (2, []), (3, [7])])
    assert columns["step"] == [1, 3] and columns["count"] == [5, 1]
    assert (columns["p10"], columns["p50"], columns["max"]) == ([14.0, 7.0], [30.0, 7.0], [50.0, 7.0])


def step(number: int, *spans: tuple[str, int, int, str, str]) -> StepTimeline:
    columns = dict(zip(("uid", "index", "tokens", "kind", "end"), map(list, zip(*spans, strict=True)), strict=True))
    return StepTimeline(step=number, phases=[], spans=columns, admitted=[], dropped=[])


def test_a_carried_sample_counts_its_earlier_tokens() -> None:
    found = of_timeline(
        [
            step(1, ("0:0", 0, 30, "launched", "paused"), ("0:1", 0, 8, "launched", "stop")),
            step(2, ("0:0", 0, 12, "resumed", "paused"), ("0:2", 0, 5, "launched", "paused")),
            step(3, ("0:0", 0, 3, "launched", "paused")),  # drawn again: its tokens were discarded
        ]
    )
    assert found["launched"]["step"] == [1, 2, 3] and found["launched"]["p50"] == [19.0, 5.0, 3.0]
    assert found["deferred"]["max"] == [30.0, 42.0, 3.0]

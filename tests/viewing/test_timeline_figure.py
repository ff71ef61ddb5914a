"""The moving picture of docs/april.md: every stay is in it, and the story it tells is the timeline's own."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from rlpost.errors import RunError
from rlpost.reporting.timeline import COLUMNS, StepTimeline, TimelineWriter
from rlpost.viewing.timeline_figure import draw, main

ROOT = Path(__file__).parents[2]


def step(number: int, *spans: tuple) -> StepTimeline:
    columns = {name: [span[n] for span in spans] for n, name in enumerate(COLUMNS)}
    return StepTimeline(step=number, phases=[], spans=columns, admitted=[], dropped=[])


# uid, index, replica, policy_version, start_s, end_s, tokens, kind, end
TWO_STEPS = [
    step(1, ("0:0", 0, 0, 0, 1.0, 3.0, 20, "launched", "stop"), ("0:1", 0, 0, 0, 1.0, 4.0, 30, "launched", "paused")),
    step(2, ("0:1", 0, 0, 1, 9.0, 9.5, 1, "resumed", "stop"), ("0:2", 0, 0, 1, 9.0, 10.5, 15, "launched", "length")),
]


def bars(svg: str) -> list[tuple[str, float, float, float]]:
    """(class, x, y, width) of every rectangle of a policy version among the rows."""
    (rows,) = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")
    shapes = [(r.get("class"), *(float(r.get(name)) for name in ("x", "y", "width"))) for r in rows]
    return [shape for shape in shapes if re.fullmatch(r"v\d", shape[0])]


def test_every_stay_is_a_bar_as_wide_as_it_was_long() -> None:
    svg = draw(TWO_STEPS, name="a < b")
    assert "Steps 1 to 2 of a &lt; b" in svg
    first, second, third, fourth = bars(svg)
    assert [bar[0] for bar in (first, second, third, fourth)] == ["v0", "v0", "v1", "v1"]
    a_second = (920 - 64) / 4.5  # two rollouts of 3 and 1.5 s beside one turn of the trainer
    for bar, seconds in ((first, 2.0), (second, 3.0), (third, 0.5), (fourth, 1.5)):
        assert bar[3] == pytest.approx(seconds * a_second - 0.5, abs=0.2)
    assert third[1] == pytest.approx(20 + 3 * a_second + 64, abs=0.2)  # after the turn, however long that was
    assert svg.count('class="cut"') == 2  # one interrupted, one in the legend
    assert ">5.0 s<" in svg


def test_the_outlined_answer_is_the_one_that_went_on() -> None:
    svg = draw(TWO_STEPS, name="run")
    assert "one response, interrupted once and finished: 30 tokens by policy 0, then 1 token by policy 1." in svg
    assert svg.count('class="story"') == 2


def test_steps_without_a_rollout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="steps that generated"):
        draw([step(0)], name="run")
    writer = TimelineWriter(tmp_path, lambda: 1.0)
    writer.log(1)
    writer.close()
    with pytest.raises(RunError, match="got 'steps 5 to 6'"):
        main([str(tmp_path), str(tmp_path / "out.svg"), "--first", "5", "--steps", "2"])


def test_the_documentations_picture_is_of_this_kind() -> None:
    svg = (ROOT / "docs" / "april.svg").read_text()
    assert len(bars(svg)) > 300 and "by policy 1, then" in svg and "prefers-reduced-motion" in svg

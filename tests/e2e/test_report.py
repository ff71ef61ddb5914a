"""`rlpost report` on runs that were really trained: one page, its numbers the run's own, seen in a browser."""

import json
from pathlib import Path

import pytest

from tests.reporting.report.chromium import Chromium, find

from .lives import Nursery
from .program import SMALL, rollouts_of, steps_of

TRAIN = ["train", "recipe=math/arithmetic", "steps=3", "checkpoint.every=2", "rollout.oversample=2.0", *SMALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one experiment, one of them deterministic and killed after its checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    with Nursery(folder) as nursery:
        for arguments in (["name=seed-0"], ["name=seed-1", "seed=1"], ["name=split", "deterministic=true"]):
            life = nursery.live(*TRAIN, *arguments)
            assert life.status == 0, life.output
        for arguments in (["runs/seed-0"], ["runs/seed-0", "runs/seed-1", "-o", "both.html"], ["runs/split"]):
            life = nursery.live("report", *arguments)
            assert life.status == 0, life.output
        assert "runs/split/report.html: 0." in life.output and "48 rollouts" in life.output
        wrong = nursery.live("report", "runs")
        assert wrong.status == 3 and "expected a run directory" in wrong.output
    return folder


@pytest.mark.skipif(find() is None, reason="no browser here: apt-get install chromium")
def test_the_pages_show_the_runs(folder: Path) -> None:
    run = folder / "runs" / "seed-0"
    accuracy = [
        row["eval/accuracy"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "eval/accuracy" in row
    ]
    with Chromium() as browser:
        browser.view(1440, 900)
        browser.open(run / "report.html")
        tiles = browser.run("document.querySelector('.tiles').textContent")
        assert f"{100 * accuracy[0]:.1f} %" in tiles and f"{100 * accuracy[-1]:.1f} %" in tiles
        assert "3 of 3" in tiles and f"{steps_of(run)[-1]['total/samples']:.0f} answers" in tiles
        answers = browser.run("[...document.querySelectorAll('.card .answer')].map(e => e.textContent)")
        first = rollouts_of(run)[1]
        assert answers == [row["response"] for row in first if row["uid"] == first[0]["uid"]]
        assert browser.run("document.querySelectorAll('.card .token').length") == sum(
            len(row["token_ids"]) for row in first if row["uid"] == first[0]["uid"]
        )
        browser.open(folder / "both.html")
        assert "2 runs, 1 experiment" in browser.run("document.querySelector('h1').textContent")
        browser.wait_for("document.querySelector('#overview .legend').textContent.includes('mean of 2 runs')")
        browser.open(folder / "runs" / "split" / "report.html")
        assert "No times were recorded" not in browser.run("document.querySelector('#overview').textContent")
        assert browser.errors == [] and len(browser.requests) == 1

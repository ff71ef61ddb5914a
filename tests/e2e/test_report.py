"""`rlpost report` on runs that were really trained: one page, its numbers the run's own, seen in a browser."""

import json
import re
from pathlib import Path

import pytest

from tests.viewing.report.chromium import Chromium, find

from .lives import Nursery
from .program import SMALL, rollouts_of, steps_of

TRAIN = ["train", "recipe=math/arithmetic", "steps=3", "checkpoint.every=2", "rollout.oversample=2.0", *SMALL]


FAST = ["deterministic=true", "train.lr=1e-3", "train.warmup_steps=0"]  # policies that differ from step to step
SPLIT = ["name=split", *FAST]
SCORED = ["name=scored", *FAST, "logging.trainer_logprobs=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one experiment, one of them deterministic and killed after its checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    with Nursery(folder) as nursery:
        for arguments in (["name=seed-0"], ["name=seed-1", "seed=1"], SPLIT, SCORED):
            life = nursery.live(*TRAIN, *arguments)
            assert life.status == 0, life.output
        reports = (["runs/seed-0"], ["runs/seed-0", "runs/seed-1", "-o", "both.html"], ["runs/scored"], ["runs/split"])
        for arguments in reports:
            life = nursery.live("report", *arguments)
            assert life.status == 0, life.output
        assert "runs/split/report.html: 0." in life.output and "48 rollouts" in life.output
        wrong = nursery.live("report", "runs")
        assert wrong.status == 3 and "expected a run directory" in wrong.output
    return folder


def test_parts_of_a_step_explain_it(folder: Path) -> None:
    for row in steps_of(folder / "runs" / "seed-0"):
        parts = {name: seconds for name, seconds in row.items() if name.startswith("waterfall/")}
        assert sum(parts.values()) == pytest.approx(row["time/step"])
        assert min(parts.values()) >= 0 and parts["waterfall/other"] < 0.1 * row["time/step"], parts
        assert parts["waterfall/engine"] > 0 and parts["waterfall/train"] > 0


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
        parts = browser.run("[...document.querySelectorAll('.parts tbody tr')].map(r => r.cells[0].textContent)")
        assert {"engine", "train", "copy", "build batch", "other"} <= set(parts)
        assert f"{100 * accuracy[0]:.1f} %" in tiles and f"{100 * accuracy[-1]:.1f} %" in tiles
        assert "3 of 3" in tiles and f"{steps_of(run)[-1]['total/samples']:.0f} responses" in tiles
        answers = browser.run("[...document.querySelectorAll('.card .response')].map(e => e.textContent)")
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


def test_the_trainers_logprobs_are_recorded_and_change_nothing(folder: Path) -> None:
    """Tokens of the policy being trained: the same logprobs in both. Older ones: the trainer has moved on."""
    runs = folder / "runs"
    assert (runs / "scored/metrics.jsonl").read_bytes() == (runs / "split/metrics.jsonl").read_bytes()
    assert all(row["old_logprobs"] is None for rows in rollouts_of(runs / "split").values() for row in rows)
    current, carried = [], []
    for step, rows in rollouts_of(runs / "scored").items():
        for row in rows:
            columns = (row[name] for name in ("old_logprobs", "rollout_logprobs", "policy_versions"))
            for old, rollout, version in zip(*columns, strict=True):
                (current if version == step - 1 else carried).append(abs(old - rollout))
    assert len(current) > 300 and max(current) < 1e-4
    assert len(carried) > 20 and max(carried) > 1e-3


@pytest.mark.skipif(find() is None, reason="no browser here: apt-get install chromium")
def test_tokens_are_coloured_by_what_the_trainer_finds_of_them(folder: Path) -> None:
    button = "[...document.querySelectorAll('#rollouts .controls .choice button')].find(b => b.textContent === '{}')"
    by_trainer = button.format("trainer − engine")
    with Chromium() as browser:
        browser.view(1440, 900)
        browser.open(folder / "runs/split/report.html")
        assert browser.run(f"{by_trainer} === undefined"), "nothing to show, nothing offered"
        browser.open(folder / "runs/scored/report.html")
        browser.wait_for(f"!!({by_trainer})")
        browser.run(f"{by_trainer}.click()")
        browser.run(
            """(() => { const order = document.querySelectorAll('#rollouts select')[1];
            order.value = '-span'; order.dispatchEvent(new Event('change'));
            document.querySelector('#rollouts .item').click(); })()"""
        )
        notes = "[...document.querySelectorAll('#rollouts .note')].map(e => e.textContent).join()"
        browser.wait_for(f"{notes}.includes('minus logprob when sampled')")
        browser.wait_for("/versions/.test(document.querySelector('.card.chosen').textContent)")
        heading = browser.run("document.querySelector('#rollouts .controls h4').textContent")
        cards = browser.run(
            """[...document.querySelectorAll('.card')].map(card => [...card.querySelectorAll('.token')].map(
            token => [token.title.split('trainer − engine ≈ ')[1], token.style.background]))"""
        )
        assert browser.errors == []
    uid, step = re.fullmatch(r"Group (\S+), trained in step (\d+)", heading).groups()
    group = [row for row in rollouts_of(folder / "runs/scored")[int(step)] if row["uid"] == uid]
    assert len(group) == len(cards)
    shown = [token for card in cards for token in card]
    true = [old - at for row in group for old, at in zip(row["old_logprobs"], row["rollout_logprobs"], strict=True)]
    for (title, background), difference in zip(shown, true, strict=True):
        told = float(title.removesuffix(" nats").replace("−", "-"))
        assert told == pytest.approx(difference, rel=0.2, abs=1e-3)
        assert f"--hue-{0 if told < 0 else 1}" in background
    assert max(map(abs, true)) > 0.01

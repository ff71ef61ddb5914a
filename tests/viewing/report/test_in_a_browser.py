"""The page in a real Chromium: drawn, fast, inert, usable by keyboard, on wide and narrow screens."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlpost.viewing.report.build import write_report

from . import hostile
from .chromium import Chromium, find
from .making import make_run

pytestmark = pytest.mark.skipif(find() is None, reason="no browser here: apt-get install chromium")
LOAD_S = 2.0  # for 500 steps and 20,000 rollouts, by the page's own clock


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run's report with everything in it."""
    return write_report([make_run(tmp_path_factory.mktemp("runs") / "small", steps=6)]).path


def text_of(browser: Chromium, selector: str) -> str:
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent).join('\\n')")


def draw_everything(browser: Chromium) -> int:
    """Opens and scrolls past all there is; returns the number of charts drawn."""
    browser.run("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    browser.run(
        "(async () => { for (let y = 0; y < document.documentElement.scrollHeight; y += 500) {"
        " scrollTo(0, y); await new Promise(requestAnimationFrame); } })()"
    )
    browser.run("new Promise(done => setTimeout(done, 150))")
    return browser.run("document.querySelectorAll('.uplot canvas').length")


def set_field(browser: Chromium, label: str, value: str) -> None:
    browser.run(
        f"(() => {{ const field = document.querySelector('#rollouts [aria-label={json.dumps(label)}]') ||"
        f" [...document.querySelectorAll('#rollouts label')].find(l => l.textContent.startsWith({json.dumps(label)}))"
        f".querySelector('input, select'); field.value = {json.dumps(value)};"
        " field.dispatchEvent(new Event('input', { bubbles: true })); field.dispatchEvent(new Event('change')); })()"
    )


def found(browser: Chromium, text: str) -> None:
    browser.wait_for(f"document.querySelector('#rollouts [role=status]').textContent === {json.dumps(text)}", 10)


def test_500_steps_and_20000_rollouts_load_in_two_seconds(browser: Chromium, tmp_path: Path) -> None:
    run = make_run(tmp_path / "big", steps=500, groups_per_step=5, samples_per_group=8, slots=32, mean_length=60)
    report = write_report([run])
    assert report.num_rollouts_shown == report.num_rollouts == 20_000
    assert report.num_bytes < 20e6
    browser.view(1440, 900)
    browser.open(report.path)
    seconds = float(browser.run("document.documentElement.dataset.ready")) / 1000
    assert seconds < LOAD_S
    assert browser.run("document.querySelectorAll('#overview .uplot').length") >= 8
    set_field(browser, "Text", "19999+1")  # a search reads every block
    found(browser, "No response matches these filters.")
    set_field(browser, "Text", "2400+1=")
    found(browser, "8 responses found")
    assert draw_everything(browser) > 40 and browser.errors == []


def test_it_asks_for_nothing_and_every_chart_draws(browser: Chromium, page: Path) -> None:
    browser.view(1440, 900)
    browser.open(page)
    assert draw_everything(browser) > 40
    assert browser.errors == [] and browser.requests == [page.resolve().as_uri()]
    painted = browser.run(
        "[...document.querySelectorAll('.uplot canvas')].filter(c => c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data.some(v => v)).length"
    )
    assert painted == browser.run("document.querySelectorAll('.uplot canvas').length")
    assert "50." in text_of(browser, ".tiles") and "6 of 6" in text_of(browser, ".tiles")


def test_a_supervised_run_shows_its_losses(browser: Chromium, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: talk-sft\nsteps: 3\n")
    rows: list[dict[str, float]] = [{"step": 0, "time_s": 0.1, "eval/loss": 2.5, "eval/tokens": 9, "time/eval": 0.1}]
    rows += [{"step": n, "time_s": n, "loss/nll": 3.0 / n, "loss/tokens": 9, "time/step": 1.0} for n in (1, 2, 3)]
    rows += [{"step": 3, "time_s": 4.0, "eval/loss": 0.25, "eval/tokens": 9, "time/eval": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    browser.view(1440, 900)
    browser.open(write_report([tmp_path]).path)
    assert draw_everything(browser) > 2 and browser.errors == []
    assert "Held-out loss2.5 → 0.25" in text_of(browser, ".tiles")
    assert "Training loss" in text_of(browser, ".controls")


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)])
def test_nothing_is_wider_than_the_screen(browser: Chromium, page: Path, width: int, dark: bool) -> None:
    browser.view(width, 844, dark=dark, mobile=width < 500)
    browser.open(page)
    draw_everything(browser)
    assert browser.run("document.documentElement.scrollWidth") <= width
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 26)" if dark else "rgb(246, 246, 243)")
    browser.run("document.querySelector('button.theme').click()")
    assert browser.run("getComputedStyle(document.body).backgroundColor") != ground


def test_hostile_content_is_shown_and_does_nothing(browser: Chromium, tmp_path: Path) -> None:
    page = write_report([hostile.make_hostile_run(tmp_path)], tmp_path / "report.html").path
    browser.view(1440, 900)
    browser.open(page)
    draw_everything(browser)
    answers = browser.run("[...document.querySelectorAll('#rollouts .card .response')].map(e => e.textContent)")
    assert answers == list(hostile.SEEN.values())
    for selector in ("h1", ".prompt", ".warnings", "#rewards h4", "#settings", ".description"):
        assert "<img src=x onerror=" in text_of(browser, selector), selector
    assert browser.run("document.body.dataset.owned ?? null") is None
    assert browser.run("document.querySelectorAll('img, svg, iframe, object').length") == 0
    assert browser.errors == [] and browser.requests == [page.resolve().as_uri()]
    for colouring in (1, 2):
        browser.run(f"document.querySelectorAll('#rollouts .controls .choice button')[{colouring}].click()")
        browser.wait_for(
            f"document.querySelectorAll('#rollouts .controls .choice button')[{colouring}].ariaPressed === 'true'"
        )
    assert browser.run("document.body.dataset.owned ?? null") is None and browser.errors == []


def test_seeds_are_averaged_where_all_have_values(browser: Chromium, page: Path) -> None:
    browser.open(page)
    lines = "[{x: [0, 2, 4], y: [1, 3, null]}, {x: [1, 2, 3], y: [4, 5, 6]}]"
    both = browser.run(f"aggregate({lines})")  # the first is 2 at 1; where one of them is unknown there is nothing
    assert both == {"x": [1, 2], "mean": [3, 4], "low": [2, 3], "high": [4, 5]}
    columns = "{step: [3, 1, 2, null], 'loss/entropy': [0.3, 0.1, null, 9]}"
    assert browser.run(f"curve({columns}, 'loss/entropy', 'step')") == {
        "x": [1, 2, 3],
        "y": [0.1, None, 0.3],
        "row": [1, 2, 0],
    }


def test_numbers_and_running_samples_by_hand(browser: Chromium, page: Path) -> None:
    browser.open(page)
    written = browser.run("[number(0), number(1234567), number(0.00012), number(NaN), percent(0.1234), duration(3725)]")
    assert written == ["0", "1,234,567", "1.2e\u22124", "\u2013", "12.3 %", "1 h 02 min"]
    spans = "[{start: 0, end: 2}, {start: 1, end: 3}, {start: 2, end: 4}]"
    assert browser.run(f"concurrency({spans})") == {"x": [0, 1, 2, 3, 4], "y": [1, 2, 2, 1, 0]}
    bars = "binned([{label: 'a', x: [...Array(240).keys()], y: Array(240).fill(1).map((v, i) => i % 2 ? 3 : 1)}])"
    assert browser.run(f"(b => [b.size, b[0].x.slice(0, 2), b[0].y.slice(0, 2)])({bars})") == [2, [1, 3], [2, 2]]


def test_parts_of_a_step_are_means_over_its_steps(browser: Chromium, page: Path) -> None:
    browser.open(page)
    parts = "'waterfall/engine': [3, 4], 'waterfall/hand_over': [null, 1], 'waterfall/idle': [0]"
    columns = f"{{'time/step': [4, 6], {parts}}}"
    rows = f"[...partsOfSteps({columns}).querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    assert browser.run(rows) == [["engine", "3.5 s", "87.5 %", ""], ["hand over", "0.5 s", "12.5 %", ""]]
    assert browser.run("partsOfSteps({'time/step': [4]})") is None, "a run recorded before there were parts"


def test_filters_and_colours_of_the_answers(browser: Chromium, page: Path) -> None:
    browser.view(1440, 900)
    browser.open(page)
    found(browser, "96 responses found")
    set_field(browser, "Step from", "3")
    set_field(browser, "Step to", "4")
    found(browser, "32 responses found")
    set_field(browser, "Reward from", "1")
    browser.wait_for("!document.querySelector('#rollouts [role=status]').textContent.startsWith('32')")
    rows = text_of(browser, "#rollouts .item .meta").splitlines()
    assert rows and all("reward 1" in row and ("step 3" in row or "step 4" in row) for row in rows)
    browser.run("[...document.querySelectorAll('#rollouts .filters button')].at(-1).click()")
    found(browser, "96 responses found")
    set_field(browser, "Order", "-span")
    browser.wait_for("document.querySelector('.card.chosen')?.querySelectorAll('.token').length > 5")
    browser.wait_for("document.querySelector('#rollouts .item').textContent.includes('versions')")
    chosen = ".card.chosen .response .token"
    tints = browser.run(f"new Set([...document.querySelectorAll('{chosen}')].map(t => t.className)).size")
    assert tints >= 2
    assert "policy version" in browser.run(f"document.querySelector('{chosen}').title")
    browser.run("document.querySelectorAll('#rollouts .controls .choice button')[1].click()")
    browser.wait_for(f"document.querySelector('{chosen}').style.background.includes('color-mix')")
    assert browser.run("document.querySelectorAll('#rollouts .card').length") == 4


def test_the_keyboard_reaches_what_the_mouse_does(browser: Chromium, page: Path) -> None:
    browser.view(1440, 900)
    browser.open(page)
    found(browser, "96 responses found")
    browser.run("document.querySelector('#rollouts .item').focus()")
    before = text_of(browser, "#rollouts .group-view h4")
    for _ in range(4):
        browser.press("ArrowDown")
    browser.wait_for(f"document.querySelector('#rollouts .group-view h4').textContent !== {json.dumps(before)}")
    browser.run("document.querySelector('#overview .plot').focus()")
    browser.press("ArrowRight")
    browser.wait_for("document.querySelector('#overview .plot .tip').style.display === 'block'")
    assert "%" in text_of(browser, "#overview .plot .tip")
    browser.run("document.querySelectorAll('#overview .choice button')[1].focus()")
    browser.press("Enter")
    browser.wait_for("document.querySelectorAll('#overview .choice button')[1].ariaPressed === 'true'")


def test_the_timeline_shows_lives(browser: Chromium, page: Path) -> None:
    browser.view(1440, 900)
    browser.open(page)
    browser.run("document.querySelector('#timeline').scrollIntoView()")
    browser.wait_for("document.querySelectorAll('#timeline .uplot').length === 2")
    assert "interrupted" in text_of(browser, "#timeline [role=status]")
    assert "Steps 3 to 4" in text_of(browser, "#timeline [role=status]")
    browser.run("document.querySelector('#timeline [aria-label=\"Later step\"]').click()")
    browser.wait_for("document.querySelector('#timeline [role=status]').textContent.startsWith('Steps 4 to 5')")
    browser.run("[...document.querySelectorAll('#timeline .choice button')].at(-1).click()")
    box = browser.wait_for(
        "(r => r.width && { x: r.x, y: r.y, w: r.width })"
        "(document.querySelector('.gantt .u-over').getBoundingClientRect())"
    )
    for share in (0.02, 0.04, 0.06, 0.08, 0.1, 0.15):
        browser.move_mouse(box["x"] + share * box["w"], box["y"] + 5)
        if "policy version" in text_of(browser, ".gantt .tip"):
            break
    tip = text_of(browser, ".gantt .tip")
    assert "policy version" in tip and "tokens" in tip and "replica" in tip
    assert browser.errors == []


def rewrite(run: Path, change: Any) -> None:
    """``metrics.jsonl`` with every line as ``change`` makes it; None drops it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in map(change, lines) if line is not None]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def without_numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name in ("step", "time_s") else None for name, value in line.items()} | {"log/not_finite": 9}


def strange_run(folder: Path, kind: str) -> Path:
    run = make_run(folder / kind, steps=1 if kind == "one step" else 3, timeline=kind != "no timeline",
                   evals=kind != "no evaluations", finished=kind != "killed early")  # fmt: skip
    if kind == "not finite":
        rewrite(run, without_numbers)
    if kind == "killed early":
        rewrite(run, lambda line: line if line["step"] == 0 else None)
        for file in [*(run / "rollouts").iterdir(), run / "timeline.jsonl"]:
            file.unlink()
    if kind == "only failures":
        failed = {"reward/failed": 16, "reward/failed/timeout": 12, "reward/failed/crash": 4, "reward/mean": 0.0}
        rewrite(run, lambda line: line | failed if "loss/tokens" in line else None)
    if kind == "no configuration":
        (run / "config.yaml").unlink()
    if kind == "no tokenizer":
        (run / "model" / "tokenizer.json").unlink()
    return run


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no timeline", "This run has no timeline.jsonl"),
        ("no evaluations", "No evaluation was recorded; the training reward is shown."),
        ("one step", "1 of 1"),
        ("only failures", "reward: timeout"),
        ("not finite", "Nothing was recorded for this."),
        ("killed early", "This run kept no rollouts"),
        ("no configuration", "There is no config.yaml"),
        ("no tokenizer", "tokenizer was not found"),
    ],
)
def test_a_run_that_lacks_something_still_gives_a_page(browser: Chromium, tmp_path: Path, kind: str, said: str) -> None:
    page = write_report([strange_run(tmp_path, kind)]).path
    browser.view(1440, 900)
    browser.open(page)
    draw_everything(browser)
    assert said in text_of(browser, "main")
    assert browser.errors == []
    values = text_of(browser, "section:not(#metrics)")
    assert "undefined" not in values and "NaN" not in values and "null" not in text_of(browser, "#overview")


def test_runs_are_compared_and_seeds_become_a_band(browser: Chromium, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"april-{seed}", steps=5, seed=seed) for seed in range(3)]
    other = yaml.safe_load((runs[0] / "config.yaml").read_text())["rollout"] | {"max_staleness": 0}
    runs.append(make_run(tmp_path / "sync-0", steps=4, seed=7, timeline=False, config={"rollout": other}))
    page = write_report(runs, tmp_path / "compare.html").path
    browser.view(1440, 900)
    browser.open(page)
    assert "4 runs, 2 experiments" in text_of(browser, "h1")
    assert browser.run("document.querySelectorAll('#overview table tbody tr').length") == 4
    browser.wait_for("document.querySelector('#overview .legend').textContent.includes('april (mean of 3 runs')")
    assert "rollout.max_staleness" in text_of(browser, "#settings")
    browser.run(
        "(s => { s.value = '3'; s.dispatchEvent(new Event('change')); })(document.querySelector('.chooser select'))"
    )
    browser.wait_for("document.querySelector('#timeline').textContent.includes('no timeline.jsonl')")
    draw_everything(browser)
    assert "sync-0" in text_of(browser, "#overview h3") and browser.errors == []

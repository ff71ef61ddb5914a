"""The file as text: what it may ask for, what a hostile run can put into it, how large it gets."""

import base64
import hashlib
import json
import re
import zlib
from pathlib import Path

import pytest

from rlpost.errors import RunError
from rlpost.viewing.report.build import write_report
from rlpost.viewing.report.page import SCRIPTS, read_static

from .hostile import make_hostile_run
from .making import make_run

STATIC = Path(__file__).parents[3] / "rlpost" / "viewing" / "report" / "static"


def scripts(html: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", html, re.DOTALL)


def test_one_file_without_an_address_to_load_from(tmp_path: Path) -> None:
    report = write_report([make_run(tmp_path / "run", steps=2)])
    html = report.path.read_text()
    assert report.path == tmp_path / "run" / "report.html" and report.num_bytes == report.path.stat().st_size
    assert (report.num_rollouts, report.num_rollouts_shown) == (32, 32)
    outside = html
    for script in scripts(html):
        outside = outside.replace(script, "")
    assert not re.search(r"(src|href)=|url\(|@import", outside)
    assert [path.name for path in (tmp_path / "run").glob(".*")] == []  # nothing unfinished is left


def test_only_our_two_scripts_are_allowed_to_run(tmp_path: Path) -> None:
    html = write_report([make_run(tmp_path / "run", steps=1)]).path.read_text()
    allowed = re.search(r"script-src ([^\"]+)\"", html)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts(html)]
    assert allowed and allowed[1].split() == [f"'sha256-{d}'" for d in digests] and len(digests) == 2


def test_nothing_a_run_wrote_stands_in_the_html(tmp_path: Path) -> None:
    html = write_report([make_hostile_run(tmp_path)]).path.read_text()
    outside = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert (
        "<img" not in outside and outside.count("onerror") == outside.count("&lt;img src=x onerror") == 1
    )  # the title
    assert "\x00" not in html and "\x1b" not in html
    data = re.findall(r'<script type="text/plain" id="[a-z]+(?:-\d+)?">([^<]*)</script>', html)
    assert len(data) >= 3 and all(re.fullmatch(r"[A-Za-z0-9+/=]+", text) for text in data)


@pytest.mark.parametrize("max_mb", [0.8, 1.0])
def test_the_file_stays_within_its_size_and_says_what_is_left_out(tmp_path: Path, max_mb: float) -> None:
    run = make_run(tmp_path / "run", steps=60, groups_per_step=8, samples_per_group=8, mean_length=90)
    report = write_report([run], max_bytes=int(max_mb * 1e6))
    assert report.num_bytes <= max_mb * 1e6
    assert 0 < report.num_rollouts_shown < report.num_rollouts == 3840
    assert f"{report.num_rollouts_shown:,} of 3,840 rollouts, sampled evenly" in str(report)


def test_a_very_long_run_is_thinned_out_and_keeps_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlpost.viewing.report.build.MAX_STEPS", 4)
    html = write_report([make_run(tmp_path / "run", steps=10)]).path.read_text()
    (packed,) = re.findall(r'id="overview">([^<]*)<', html)
    (run,) = json.loads(zlib.decompress(base64.b64decode(packed)))["runs"]
    assert (run["every"], run["steps"]["step"]) == (3, [1, 4, 7, 10])
    assert len(run["steps"]["reward/mean"]) == 4 and run["lengths"]["admitted"]["step"] == list(range(1, 11))


def test_several_runs_go_into_one_file_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / name, steps=1, seed=n) for n, name in enumerate("ab")]
    monkeypatch.chdir(tmp_path)
    assert write_report([*runs, runs[0]]).path == Path("report.html")
    assert write_report(runs).num_rollouts == 32  # a run named twice is one


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="choose another with -o"):
        write_report([make_run(tmp_path / "run", steps=1)], tmp_path / "absent" / "report.html")


def test_the_library_is_the_version_and_the_file_its_note_names() -> None:
    note = (STATIC / "uplot" / "README.md").read_text()
    version = re.search(r"uPlot (\d+\.\d+\.\d+)", note)
    assert version and f"(v{version[1]})" in read_static("uplot/uPlot.iife.min.js")[:80]
    for name in ("uPlot.iife.min.js", "uPlot.min.css", "LICENSE"):
        digest = hashlib.sha256((STATIC / "uplot" / name).read_bytes()).hexdigest()
        assert f"{digest}  {name}" in note
    assert "MIT License" in read_static("uplot/LICENSE")


def test_every_static_file_is_used_and_holds_no_end_of_a_script() -> None:
    ours = {path.name for path in STATIC.glob("*.js")}
    assert ours == set(SCRIPTS)
    for path in STATIC.rglob("*.js"):
        assert "</script" not in path.read_text().lower() and "<!--" not in path.read_text(), path.name


def test_our_script_never_parses_text_as_html() -> None:
    for name in SCRIPTS:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", read_static(name)), name

"""`make docs`: the site builds, a broken link or anchor ends the build, no page asks for anything, search works."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.viewing.report.chromium import Chromium, find

ROOT = Path(__file__).parent.parent
OF_THE_BUILD = ("mkdocs.yml", "README.md", "docs")


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "-f", str(source / "mkdocs.yml"), "-d", str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=source)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files of the build, to be spoilt; the rest of the repository by links."""
    for entry in ROOT.iterdir():
        if entry.name not in OF_THE_BUILD and not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    for name in ("mkdocs.yml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


@pytest.mark.parametrize(
    ("page", "words", "said"),
    [
        ("docs/gpu.md", "[x](no-page.md)", "contains a link 'no-page.md'"),
        ("docs/gpu.md", "[x](april.md#no-anchor)", "does not contain an anchor '#no-anchor'"),
        ("docs/adr/0001-pins-without-dependencies.md", "[x](../../rlpost/no_file.py)", "no_file.py"),
        ("README.md", "[x](docs/april.md#no-anchor)", "does not contain an anchor '#no-anchor'"),
    ],
)
def test_a_broken_link_ends_the_build(copy: Path, page: str, words: str, said: str) -> None:
    with (copy / page).open("a") as file:
        file.write(f"\n{words}\n")
    done = build(copy, copy / "out")
    assert done.returncode != 0 and said in done.stderr, done.stderr
    assert "Aborted with 1 warnings" in done.stdout + done.stderr


def test_a_page_outside_the_navigation_ends_the_build(copy: Path) -> None:
    (copy / "docs" / "forgotten.md").write_text("# Forgotten\n")
    done = build(copy, copy / "out")
    assert done.returncode != 0 and "forgotten.md" in done.stdout + done.stderr


# ---- links that leave docs/ ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("source", "written", "on_the_site"),
    [
        ("README.md", "[a](docs/april.md#one-step)", "[a](april.md#one-step)"),
        ("README.md", "![a picture](docs/loop.svg)", "![a picture](loop.svg)"),
        ("README.md", "[rlpost/loop.py](rlpost/loop.py)", "`rlpost/loop.py`"),
        ("README.md", "[`code`](rlpost/loop.py)", "`code`"),
        ("README.md", "[here](#installation)", "[here](#installation)"),
        ("docs/april.md", "[a](../README.md#installation)", "[a](readme.md#installation)"),
        ("docs/adr/0003-ledger-and-snapshots.md", "[a](../april.md)", "[a](../april.md)"),
        ("docs/adr/0003-ledger-and-snapshots.md", "[a](../../README.md)", "[a](../readme.md)"),
        ("docs/april.md", "[gone](../rlpost/gone.py)", "[gone](../rlpost/gone.py)"),
        ("docs/april.md", "[out](https://pytorch.org)", "[out](https://pytorch.org)"),
        ("docs/april.md", "```\n[a](../LICENSE)\n```", "```\n[a](../LICENSE)\n```"),
    ],
)
def test_links_as_the_site_needs_them(hooks, source: str, written: str, on_the_site: str) -> None:
    assert hooks.rewrite(written, source, ROOT) == on_the_site


# ---- the pages -----------------------------------------------------------------------------------------------------


def test_the_site_has_every_page_and_the_readme(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    there = {path.relative_to(site) for path in site.rglob("*.html")}
    assert pages | {Path("readme.html"), Path("404.html")} == there
    assert "One recipe, line by line" in (site / "readme.html").read_text()


def test_pages_ask_nothing_of_a_network(site: Path) -> None:
    """Scripts, styles, pictures and what styles fetch are files of the site; only links to be clicked lead out."""
    loaded = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?([^\"\s>]+)")
    for page in site.rglob("*.html"):
        for address in loaded.findall(page.read_text()):
            assert not re.match(r"(https?:)?//", address), f"{page.name}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text()), style


@pytest.mark.skipif(find() is None, reason="no browser here: apt-get install chromium")
def test_opened_from_the_disk_search_finds_a_key(site: Path) -> None:
    with Chromium() as browser:
        browser.view(1280, 900)
        browser.call("Page.navigate", url=(site / "index.html").as_uri())
        browser.wait_for(
            "document.readyState === 'complete' && !!document.querySelector('[data-md-component=search-query]')"
        )
        browser.run("document.querySelector('[data-md-component=search-query]').focus()")
        browser.call("Input.insertText", text="watchdog_s")
        found = browser.wait_for("document.querySelector('.md-search-result__item')?.textContent")
        assert "watchdog" in found.lower()
        assert [address for address in browser.requests if not address.startswith(("file:", "data:", "about:"))] == []
        assert browser.errors == []

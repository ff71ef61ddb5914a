"""What the page says of a table: claims only where they hold; well-formed pictures; the page that ships."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from rlpost.bench.learning.cells import CORRECTED, PLAIN, SYNC, explored_cells
from rlpost.bench.learning.page import BEGIN, END, make_report, replace_section, write_report
from rlpost.bench.learning.study import choose_cells, digest_cells, valid_rows
from rlpost.bench.learning.table import read_table
from rlpost.errors import DataError
from tests.bench.learning.rows import row, table

ROOT = Path(__file__).parent.parent.parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def line_of(text, *begin):
    (found,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(begin))]
    return found


def test_the_page_claims_what_holds_and_says_what_is_missing():
    rows = table(
        "grpo", {SYNC: [0.8] * 5, PLAIN: [0.8, 0.7, 0.8, 0.75, 0.8], CORRECTED: [0.80, 0.81, 0.80, 0.81, 0.80]}
    )
    rows += table("gspo", {SYNC: [0.8] * 2, CORRECTED: [0.8] * 2})
    text = make_report(rows, num_left_out=3).text
    assert "19 of 39 runs of the comparison and 0 of 28 of the exploration" in text and "3 rows of other" in text
    assert "+0.4 (-0.3 to +1.1); **no worse**" in line_of(text, "GRPO", CORRECTED, "5 of 5")
    assert "-3.0 (-8.6 to +2.6); not shown to be no worse |" in line_of(text, "GRPO", PLAIN, "5 of 5")
    gspo = line_of(text, "GSPO", CORRECTED, "2 of 5")
    assert "not shown to be no worse, pairs are missing" in gspo and "no worse**" not in gspo
    assert "DAPO" not in text
    assert "took 1.05 times its CPU time (median; at most 1.05)." in text and "left out at equal time" not in text


def test_an_empty_table_claims_nothing():
    report = make_report([])
    assert "0 of 39" in report.text and "no worse" not in report.text and not report.pictures


def test_pictures_hold_every_strategy_and_a_band_where_there_are_three_seeds():
    rows = table("grpo", {SYNC: [0.8, 0.7, 0.75], PLAIN: [0.8, 0.7, 0.6], CORRECTED: [0.8, 0.82]})
    rows += [row(cell, 0.7) for cell in explored_cells() if not cell.is_main]
    pictures = {name: ElementTree.fromstring(svg) for name, svg in make_report(rows).pictures.items()}
    curves, exploration = pictures["learning-curves.svg"], pictures["learning-exploration.svg"]
    assert len(curves.findall(f"{SVG}polyline")) == 3 * 2 and len(curves.findall(f"{SVG}polygon")) == 2 * 2
    assert len(exploration.findall(f"{SVG}circle")) == 28 + 4
    for picture in pictures.values():
        width, height = float(picture.get("width")), float(picture.get("height"))
        for text in picture.iter(f"{SVG}text"):
            end = float(text.get("x")) + (7 * len(text.text) if text.get("text-anchor") == "start" else 0)
            assert end <= width and 0 <= float(text.get("y")) <= height, text.text


def test_the_section_is_replaced_and_nothing_else():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_section(page, "new", name="p") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    with pytest.raises(DataError, match="no section"):
        replace_section("a page", "new", name="p")


def test_the_page_that_ships_says_what_the_table_that_ships_holds(tmp_path):
    """Fails where the table, a default or the words changed: `rlpost bench learning --report`."""
    page, folder = ROOT / "docs" / "april.md", tmp_path / "studies"
    folder.mkdir()
    source = ROOT / "docs" / "studies" / "learning.jsonl"
    (folder / source.name).write_text(source.read_text())
    (tmp_path / "april.md").write_text(page.read_text())
    report = write_report(folder / source.name, tmp_path / "april.md")
    assert (tmp_path / "april.md").read_text() == page.read_text()
    for name, picture in report.pictures.items():
        assert (source.parent / name).read_text() == picture
    cells, rows = choose_cells(()), read_table(source)
    assert valid_rows(cells, digest_cells(cells), rows) or not rows, (
        "the settings changed: all rows are of another study"
    )

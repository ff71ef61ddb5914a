"""The documentation's pictures of reports:  python -m tests.viewing.report.pictures RUN_DIR [OTHER_RUN_DIR]

One run makes report.png and report-answers.png, a second one compare.png, too.
Written to docs/pictures/ in 256 colours, so that they stay small. Look at them before they are committed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from rlpost.viewing.report.build import write_report

from .chromium import Chromium

FOLDER = Path(__file__).parents[3] / "docs" / "pictures"
WIDTH = 1440
MOST_VERSIONS = """(() => { const order = document.querySelectorAll('#rollouts select')[1];
    order.value = '-span'; order.dispatchEvent(new Event('change')); })()"""
BY_SAMPLE = "[...document.querySelectorAll('#timeline .choice button')].at(-1).click()"
LIVES = """(() => { const top = document.querySelector('#rollouts').getBoundingClientRect().top + scrollY;
    const gantt = document.querySelector('.gantt').getBoundingClientRect().top + scrollY;
    return [top, gantt + 360]; })()"""


def main(run: Path, other: Path | None = None) -> None:
    names = ["report.png", "report-answers.png"]
    with tempfile.TemporaryDirectory() as folder, Chromium() as browser:
        page = write_report([run], Path(folder) / "report.html").path
        browser.view(WIDTH, 830)
        browser.open(page)
        time.sleep(0.5)
        browser.picture(FOLDER / "report.png")
        browser.run(MOST_VERSIONS)
        browser.run(BY_SAMPLE)
        browser.run("document.querySelector('#timeline').scrollIntoView()")
        time.sleep(1.5)
        browser.run("document.querySelector('#rollouts .rows').style.maxHeight = '420px'")
        top, bottom = browser.run(LIVES)
        browser.picture(FOLDER / "report-answers.png", clip=(0, top - 16, WIDTH, bottom - top + 16))
        if other is not None:
            names.append("compare.png")
            page = write_report([run, other], Path(folder) / "compare.html").path
            browser.view(WIDTH, 900)
            browser.open(page)
            time.sleep(0.5)
            browser.picture(FOLDER / "compare.png")
    for name in names:
        picture = Image.open(FOLDER / name).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        picture.save(FOLDER / name, optimize=True)
        print(FOLDER / name, (FOLDER / name).stat().st_size // 1000, "kB")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""The HTML file: our style and script, the plotting library, and the data as inert text.

Everything a run wrote (responses, failures, names) is inside the blocks, whose base64 has no character that HTML
interprets; the script puts it on the page as text only. A content policy allows only the scripts written here to run,
and no request to leave the page. Called by ``build``.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from rlpost.viewing.report.blocks import Blocks, encode

STYLES = ("uplot/uPlot.min.css", "report.css")
LIBRARY = "uplot/uPlot.iife.min.js"
# One script, in this order: each file uses the ones before it.
SCRIPTS = ("elements.js", "data.js", "charts.js", "overview.js", "details.js", "rollouts.js", "timeline.js", "start.js")

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This report is drawn with JavaScript, which is disabled.</noscript>
<main id="page"></main>
{data}
<!-- uPlot is (c) Leon Sorokin, MIT License:
{licence}-->
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""


def render(overview: Mapping[str, Any], blocks: Blocks, *, title: str) -> str:
    """The whole file as text."""
    library, script = read_static(LIBRARY), "\n".join(["'use strict';", *map(read_static, SCRIPTS)])
    texts = {"overview": encode(overview)} | {f"block-{n}": text for n, text in enumerate(blocks.texts)}
    return PAGE.format(
        allowed=" ".join(_hash(text) for text in (library, script)),
        title=html.escape(f"{title} - rlpost report".encode("utf-8", "replace").decode()),
        style="\n".join(map(read_static, STYLES)),
        data="\n".join(f'<script type="text/plain" id="{name}">{text}</script>' for name, text in texts.items()),
        licence=read_static("uplot/LICENSE"),
        library=library,
        script=script,
    )


def read_static(name: str) -> str:
    return (files("rlpost.viewing.report") / "static" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"

"""Hooks of the documentation's build: README.md becomes a page, and links that leave docs/ become text.

In the repository a page may link to any file, such as ``../README.md`` or ``../rlpost/loop.py``. On the site README.md
is the page ``readme.md``; a file of the program has no place there, and no public address is assumed, so what linked to
it stays as text. A file that does not exist keeps its link, which the strict build then refuses. MkDocs calls the
functions by their names.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

README, README_PAGE = "README.md", "readme.md"
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
IMAGE = re.compile(r"(!\[[^\]]*\]\()([^)\s]+)(\))")
CELL = re.compile(r"<td[ >].*?</td>", re.DOTALL)
FENCE = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    text = (repository(config) / README).read_text(encoding="utf-8")
    files.append(File.generated(config, README_PAGE, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    path = page.file.src_path
    return rewrite(markdown, README if path == README_PAGE else f"docs/{path}", repository(config))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """A bar inside code inside a table is written ``\\|`` in Markdown; the renderer keeps the backslash."""
    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), html)


def repository(config: Any) -> Path:
    return Path(config["docs_dir"]).parent


def rewrite(markdown: str, source: str, root: Path) -> str:
    """``markdown`` of the file ``source`` (a path below ``root``, the repository) with links as the site needs them."""
    folder = posixpath.dirname(source)
    on_site = posixpath.dirname("readme.md" if source == README else posixpath.relpath(source, "docs"))

    def target(link: str) -> str | None:
        """The link's address on the site; None for an existing file that is not on it."""
        path, hash_, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", link):
            return link
        file = posixpath.normpath(posixpath.join(folder, path))
        if file == README:
            return posixpath.relpath(README_PAGE, on_site or ".") + hash_ + anchor
        if file.startswith("docs/"):
            return posixpath.relpath(file.removeprefix("docs/"), on_site or ".") + hash_ + anchor
        return None if (root / file).exists() else link

    def link(match: re.Match[str]) -> str:
        text, address = match.groups()
        there = target(address)
        if there is not None:
            return f"[{text}]({there})"
        return text if "`" in text else f"`{text}`"

    def image(match: re.Match[str]) -> str:
        return match[1] + (target(match[2]) or match[2]) + match[3]

    def outside(text: str) -> str:
        return IMAGE.sub(image, LINK.sub(link, text))

    return "".join(part if n % 2 else outside(part) for n, part in enumerate(FENCE.split(markdown)))

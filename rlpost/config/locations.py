"""Where the files that ship with the package are: configuration, recipes, and the demo's model.

Never reads them; ``compose``, ``preflight.checks``, ``prompts.rows`` and code that opens a model or tokenizer call it.
In a checkout ``conf/`` and ``recipes/`` are beside the package; in an installed wheel they are inside it.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SCHEME = "rlpost://"


def find_conf() -> Path:
    """The folder with ``config.yaml`` and the groups."""
    return _find("conf")


def find_recipes() -> Path:
    """The folder with ``GROUP/NAME.yaml``."""
    return _find("recipes")


def find_data() -> Path:
    """The folder that ``rlpost://`` names point into."""
    return PACKAGE / "data"


def resolve_path(path: str) -> str:
    """``rlpost://NAME`` as a folder or file that ships with the package, ``~`` expanded; anything else unchanged.

    The result need not exist: a hub name stays a hub name.
    """
    if path.startswith(SCHEME):
        return str(find_data() / path.removeprefix(SCHEME))
    return expand_home(path)


def is_template_text(value: str) -> bool:
    """Whether ``data.chat_template`` holds a Jinja template itself; any other text is the path of a file."""
    return any(sign in value for sign in ("{{", "{%", "\n"))


def expand_home(path: str) -> str:
    """``~`` or ``~USER`` at the beginning as that home folder; anything else, also an unknown user, unchanged."""
    return os.path.expanduser(path)


def _find(name: str) -> Path:
    installed, checkout = PACKAGE / name, PACKAGE.parent / name
    return installed if installed.is_dir() else checkout

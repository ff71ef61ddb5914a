"""Whatever the pages and the package's docstrings and comments name of this repository exists.

Checked are *paths* (``rlpost/rollout/collect.py``, ``docs/adr``, in any text) and *dotted names* in code font
(``rollout.collect``, ``workers.protocol.Workers.recover``), which must lead to a module or to something that a module
defines or imports, or be a key of the configuration. Reads text and syntax trees only; imports none of what it checks.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from rlpost.config import walk_fields

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlpost"
# docs/studies holds what a study said when it was made; CHANGELOG.md is history.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "adr").glob("*.md"))]
SOURCES = sorted(PACKAGE.rglob("*.py"))
KEYS = {key.name for key in walk_fields()}
# Keys below which a user names what he likes: the arguments of a part, a model's shape.
OPEN_KEYS = re.compile(r"(.*\.generator|model\.shape|reward\.\w+|user|algo\.\w+|train\.optimizer)\.\w+")
FIRST = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}

FOLDERS = "rlpost|tests|benchmarks|docs|conf|recipes|requirements"
PATH = re.compile(rf"(?<![\w/.:$*~-])((?:{FOLDERS}|\.ci)/[\w./*-]*)")
IN_PACKAGE = re.compile(rf"(?<![\w/.:$*~-])((?:{'|'.join(sorted(FIRST))})/[\w/]*\w\.py)\b")
DOTTED = re.compile(r"(?:rlpost\.)?[a-z_]\w*(?:\.[A-Za-z_]\w*)+")
PYTHON_FILES = {file.name for name in ("rlpost", "tests", "benchmarks") for file in (ROOT / name).rglob("*.py")}
PYTHON_FILES |= {"setup.py"}
# Endings of file names: ``config.yaml`` is a file of a run, not an attribute of ``rlpost.config``.
ENDINGS = {"py", "md", "yaml", "json", "jsonl", "html", "svg", "txt", "sqlite", "parquet", "safetensors"}


# ---- what is named -------------------------------------------------------------------------------------------------


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def docstrings_and_comments(source: str) -> str:
    tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    words = [ast.get_docstring(node, clean=False) or "" for node in ast.walk(tree) if isinstance(node, owners)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    words += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(words)


def paths(text: str) -> Iterator[str]:
    for pattern in (PATH, IN_PACKAGE):
        for found in pattern.findall(text):
            if "/.venv/" not in found:  # made by an install
                yield found.rstrip(".-")


def code(text: str, ticks: int) -> list[str]:
    """What stands between ``ticks`` backticks, code blocks left out, without the call's brackets."""
    found = re.findall(rf"(?<!`){'`' * ticks}(?!`)([^`]+)(?<!`){'`' * ticks}(?!`)", without_fences(text))
    return [word.removesuffix("()") for words in found for word in words.split()]


def roles(text: str) -> list[str]:
    return [name.lstrip("~.") for name in re.findall(r":(?:mod|class|func|meth|attr|data|exc):`([^`]+)`", text)]


def dotted(words: list[str]) -> Iterator[str]:
    """Those that claim to be a name of ours."""
    for word in words:
        name = word.removeprefix("rlpost.")
        parts = name.split(".")
        if DOTTED.fullmatch(word) and parts[0] in FIRST and parts[-1] not in ENDINGS and (name != word or parts[1:]):
            yield name


# ---- whether it exists ---------------------------------------------------------------------------------------------


def path_exists(path: str) -> bool:
    base = PACKAGE if path.partition("/")[0] in FIRST else ROOT
    if "*" in path:
        return any(base.glob(path))
    return (base / path).exists()


def module_file(parts: tuple[str, ...]) -> Path | None:
    """The file of the module of this name below rlpost."""
    path = PACKAGE.joinpath(*parts)
    files = (path.with_suffix(".py"), path / "__init__.py") if parts else (path / "__init__.py",)
    return next((file for file in files if file.is_file()), None)


@cache
def names_in(file: Path) -> dict[str, ast.AST]:
    return names_of(ast.parse(file.read_text(encoding="utf-8")))


def attributes_in(file: Path) -> set[str]:
    """All expressions such as ``engine.step`` of a file's code."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def names_of(node: ast.AST) -> dict[str, ast.AST]:
    """What a module or a class defines, assigns (on ``self``, too) or imports."""
    found: dict[str, ast.AST] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and inner is not node:
            found.setdefault(inner.name, inner)
        elif isinstance(inner, ast.Import | ast.ImportFrom):
            found.update({(alias.asname or alias.name): inner for alias in inner.names})
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            found.setdefault(inner.id, inner)
        elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            found.setdefault(inner.attr, inner)
    return found


def name_exists(name: str) -> bool:
    parts = tuple(name.split("."))
    for length in range(len(parts), 0, -1):
        file = module_file(parts[:length])
        if file is not None:
            return leads_on(names_in(file), parts[length:])
    return False


def leads_on(names: dict[str, ast.AST], parts: tuple[str, ...]) -> bool:
    for part in parts:
        if part not in names:
            return False
        node = names[part]
        if isinstance(node, ast.Import | ast.ImportFrom):
            return True  # of another module, where it is looked for when it is named there
        names = names_of(node)
    return True


def is_known(name: str) -> bool:
    return name_exists(name) or name in KEYS or OPEN_KEYS.fullmatch(name) is not None


# ---- the tests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.parent.name == "adr":
        text = without_fences(text)  # there a record may list what was moved
    wrong = [path for path in paths(text) if not path_exists(path)]
    wrong += [name for name in dotted(code(text, 1)) if not is_known(name)]
    if page.parent.name != "adr":  # a record may name a file that was taken out again
        here = set(re.findall(r"^# (?:\w+/)*(\w+\.py)$", text, re.MULTILINE))  # an example's own files
        wrong += [word for word in code(text, 1) if re.fullmatch(r"\w+\.py", word) and word not in PYTHON_FILES | here]
    assert not wrong, f"{page.relative_to(ROOT)} names what does not exist: {sorted(set(wrong))}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_docstrings_and_comments_name_exists(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    text = docstrings_and_comments(source)
    wrong = [path for path in paths(text) if not path_exists(path)]
    used = attributes_in(file)  # ``engine.step()`` of an argument that is called engine
    wrong += [name for name in dotted(code(text, 2)) if not is_known(name) and name not in used]
    here = names_in(file)
    wrong += [
        n for n in roles(text) if not leads_on(here, tuple(n.split("."))) and not is_known(n.removeprefix("rlpost."))
    ]
    assert not wrong, f"{file.relative_to(ROOT)} names what does not exist: {sorted(set(wrong))}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see ``rollout.collect`` and ``rollout.gone``", ["rollout.gone"]),
        ("``workers.protocol.Workers.recover``, ``workers.protocol.Workers.gone``", ["workers.protocol.Workers.gone"]),
        ("``config.yaml``, ``rollout.keep_kv``, ``train.lr``, ``np.float32``, ``self.rollout.x``", []),
        ("``rlpost.config.walk_fields``, ``rlpost.rollout.prompts``", ["rollout.prompts"]),
        (
            "in rlpost/loop.py, rlpost/gone.py, rollout/collect.py and rollout/gone.py.",
            ["rlpost/gone.py", "rollout/gone.py"],
        ),
        ("docs/adr, docs/*.md, tests/gone/, https://x.org/docs/gone", ["tests/gone/"]),
    ],
)
def test_this_test_sees_what_is_gone_and_nothing_else(text: str, found: list[str]) -> None:
    missing = [path for path in paths(text) if not path_exists(path)]
    assert missing + [name for name in dotted(code(text, 2)) if not is_known(name)] == found


PLACES = sorted(
    {
        name
        for file in (ROOT / "tests/e2e").glob("*.py")
        for name in re.findall(r'"(rlpost[\w.]*:[\w.]+)"', file.read_text())
    }
)


@pytest.mark.parametrize("place", PLACES)
def test_the_places_at_which_runs_are_killed_exist(place: str) -> None:
    """By their source: ``module:name``, so that a renamed function is missed here and not after an hour."""
    module, _, name = place.partition(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    for part in name.split("."):
        (tree,) = [node for node in tree.body if getattr(node, "name", "") == part]  # type: ignore[assignment]
